"""RoBERTa."""

from __future__ import annotations

from headrace.models.bert import Model as Bert


class Model(Bert):
    """BERT whose table of positions begins with two rows that no token has."""

    root = "roberta."
    first_position = 2
