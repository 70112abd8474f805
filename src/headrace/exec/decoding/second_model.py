"""A model beside the engine's, with a small cache of its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.nn.functional as F
from torch import Tensor

from headrace.contracts.cache import layout_of
from headrace.contracts.step import PlanRow
from headrace.exec.decoding.drafter import DraftParts, Guess
from headrace.exec.forward import Forward, LoadedModel
from headrace.kv.arena import KVArena

_CHUNK = 512
"""Tokens of one sequence that are fed at once."""


@dataclass(slots=True)
class _Held:
    """What a stretch of the cache holds: of ``sequence``, its first tokens and those from
    ``start`` on, ``count`` in all.
    """

    sequence: int = -1
    start: int = 0
    count: int = 0


class SecondModel:
    """Feeds what it has not seen of each sequence, and says what comes next.

    Each row of the engine's page tables has a stretch of ``window`` slots. A text that outgrows it
    begins anew with its first ``sinks`` tokens and its last ones, half of the window together, at
    positions from 0 on: attention sinks and recent tokens, at positions within the cache (Efficient
    Streaming Language Models with Attention Sinks, section 3.2), computed again rather than turned.

    Args:
        window: tokens that it sees at most; 0: as many as it and a sequence may have.
        sinks: first tokens that it keeps seeing.

    Raises:
        ValueError: the model keeps a recurrent state, or the window is too small, or too large for
            the memory.
    """

    def __init__(self, loaded: LoadedModel, parts: DraftParts, window: int, sinks: int) -> None:
        layout = layout_of(loaded.states, loaded.block_size)
        if layout.states:
            raise ValueError("model: it keeps a recurrent state, from which no token can be taken")
        sizes = (parts.context, loaded.context, window or parts.context)
        self.window = min(sizes)
        if self.window < 4 * max(1, sinks):
            raise ValueError(
                f"it sees {self.window} tokens at most; that has to be 4 times sinks={sinks}"
            )
        self._sinks, self._vocab = sinks, parts.vocab_size
        pages = layout.pages_for(self.window)
        shape = (len(layout.groups), parts.table_rows, pages)
        self._tables = np.arange(np.prod(shape), dtype=np.int32).reshape(shape)
        try:
            arena = KVArena(layout, self._tables.size, loaded.ops.device)
        except RuntimeError as error:
            raise ValueError(
                f"window: a cache of {self.window} tokens for each of {parts.table_rows} sequences "
                f"does not fit into memory; lower it, or max_num_seqs: {error}"
            ) from None
        self._forward = Forward(loaded.model, arena, loaded.ops)
        self._held = [_Held() for _ in range(parts.table_rows)]

    def next_logits(self, guesses: Sequence[Guess]) -> Tensor:
        """What follows the tokens of each sequence, ``[R, vocab]``, padded or cut to the engine's
        vocabulary.
        """
        texts = [(guess.row, self._text(guess)) for guess in guesses]
        while behind := [each for each in texts if self._missing(*each) > _CHUNK]:
            self._feed(behind)
        logits = self._feed(texts)[:, : self._vocab].float()
        return F.pad(logits, (0, self._vocab - logits.shape[1]), value=-math.inf)

    def _text(self, guess: Guess) -> list[int]:
        """What the model sees of a sequence."""
        known, row = guess.known, guess.row
        held = self._held[row.table_row]
        if held.sequence != row.sequence:
            held = self._held[row.table_row] = _Held(row.sequence)
        if len(known) - max(0, held.start - self._sinks) > self.window:
            held.start, held.count = len(known) - (self.window // 2 - self._sinks), 0
        return known if held.start == 0 else known[: self._sinks] + known[held.start :]

    def _missing(self, row: PlanRow, text: list[int]) -> int:
        return len(text) - self._held[row.table_row].count

    def _feed(self, texts: Sequence[tuple[PlanRow, list[int]]]) -> Tensor:
        """Feed up to a chunk of each text; returns the logits after it, ``[R, vocab]``."""
        rows = []
        for row, text in texts:
            held = self._held[row.table_row]
            end = min(len(text), held.count + _CHUNK)
            positions = range(held.count, end)
            ids = text[held.count : end]
            rows.append(PlanRow(row.sequence, row.table_row, ids, positions, held.count))
            # What a page held before must not leak into padded reads.
            layout = self._forward.arena.layout
            entered = slice(layout.pages_for(held.count), layout.pages_for(end))
            pages = self._tables[:, row.table_row, entered]
            self._forward.arena.blank_pages(pages.flatten().tolist())
            held.count = end
        return self._forward.last_logits(self._forward.hidden(rows, self._tables), rows)

    def forget(self, row: PlanRow, length: int) -> None:
        """Of the sequence of a row, only the first ``length`` tokens are what they were."""
        held = self._held[row.table_row]
        if length <= held.start:
            held.start = held.count = 0
        skipped = max(0, held.start - self._sinks)
        held.count = min(held.count, max(0, length - skipped))
