"""Speculative decoding: tokens are guessed, and one verifier decides which of them stay."""
