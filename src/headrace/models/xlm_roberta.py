"""XLM-RoBERTa, as in many multilingual embedders."""

from __future__ import annotations

from headrace.models.roberta import Model as Roberta


class Model(Roberta):
    """RoBERTa's shape, with another vocabulary."""
