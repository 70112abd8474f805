"""Methods by which sequences see each other: one file each, named as the method is chosen."""
