"""Evaluation of models and methods: tasks, measures, comparisons; all through ``LLM``."""
