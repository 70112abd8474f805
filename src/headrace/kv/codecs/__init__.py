"""Codecs of the KV cache: one file each, named as the codec is chosen."""
