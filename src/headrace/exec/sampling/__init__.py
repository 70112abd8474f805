"""Sampling: a chain of steps over the logits of all rows."""
