"""Vocabularies in all the forms that checkpoints have, each turned into a ready tokenizer."""
