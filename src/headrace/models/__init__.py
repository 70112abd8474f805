"""Architectures: one file each, named after its ``model_type``."""
