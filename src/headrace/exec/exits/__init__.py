"""Methods whose rows may leave the stack of layers: one file each, named as it is chosen."""
