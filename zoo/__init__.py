"""Training recipes for the language models of the Headrace family."""
