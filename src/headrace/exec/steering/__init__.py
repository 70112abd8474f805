"""Methods that change activations on their way: one file each, named as the method is chosen."""
