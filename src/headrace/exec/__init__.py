"""Execution of step plans: batch, layer loop, logits, sampling."""
