"""Methods that guess tokens: one file each, named as the method is chosen."""
