"""Checkpoints in: finding, reading, checking and packing weights."""
