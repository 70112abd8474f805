"""GGUF files as checkpoints: the format, its types, and what they are for Hugging Face."""
