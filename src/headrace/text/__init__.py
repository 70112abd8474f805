"""Text in and out: tokenizer, chat templates, streaming detokenizer."""
