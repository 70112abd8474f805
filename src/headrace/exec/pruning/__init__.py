"""Methods that drop tokens of a prompt between layers: one file each, named as it is chosen."""
