"""Tokens in the order of training: a pure function of the seed and the position."""

import bisect
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from zoo.tokenizer import token_id

Tokens = NDArray[np.uint16]


@dataclass(frozen=True)
class Phase:
    """A stretch of training at one context length, as a share of the token budget."""

    share: float
    context_length: int


@dataclass(frozen=True)
class SpecialIds:
    """Identifiers of the special tokens that delimit documents."""

    end_of_text: int
    prefix: int
    middle: int
    suffix: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpecialIds":
        """Look the identifiers up by name; raises KeyError if the vocabulary lacks one."""
        names = ("<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>")
        return cls(*(token_id(tokenizer, name) for name in names))


def encode_documents(tokenizer: Tokenizer, documents: Sequence[str]) -> list[Tokens]:
    """Return the tokens of each document, without the end of text."""
    encodings = tokenizer.encode_batch(list(documents), add_special_tokens=False)
    return [np.array(encoding.ids, dtype=np.uint16) for encoding in encodings]


def fill_in_the_middle(
    document: Tokens, piece_length: int, special: SpecialIds, generator: np.random.Generator
) -> Tokens:
    """Cut a document into pieces and write each as prefix, suffix, middle.

    "Efficient Training of Language Models to Fill in the Middle", in its PSM order. The pieces
    are shorter than the context, so that the model sees both sides of what it fills in.
    """
    parts: list[Sequence[int] | Tokens] = []
    for start in range(0, len(document), piece_length):
        piece = document[start : start + piece_length]
        first, second = sorted(generator.integers(0, len(piece) + 1, size=2))
        parts += [[special.prefix], piece[:first], [special.suffix], piece[second:]]
        parts += [[special.middle], piece[first:second], [special.end_of_text]]
    return np.concatenate(parts).astype(np.uint16)


class Batches(Protocol):
    """What a run is trained on: a pure function of the step."""

    steps: int

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return inputs and targets, int64 ``(rows, length)``; IndexError past the end."""

    def digest(self) -> str:
        """Return the SHA-256, in hexadecimal, of everything that determines the batches."""


class TrainingData:
    """Packed windows of shuffled documents, addressed by step.

    Each phase counts its own epochs; each epoch of each phase has its own order of documents and
    of windows, drawn from ``(seed, phase, epoch)``. ``chat_share`` of the tokens of an epoch are
    conversations, other ones each time. After the first epoch of the first phase, in which every
    document is plain, ``fill_in_share`` of them are written for filling in the middle.
    """

    def __init__(
        self,
        documents: Sequence[Tokens],
        chats: Sequence[Tokens],
        special: SpecialIds,
        phases: Sequence[Phase],
        token_budget: int,
        tokens_per_step: int,
        seed: int,
        chat_share: float = 0.06,
        fill_in_share: float = 0.08,
    ) -> None:
        self.documents, self.chats, self.special = list(documents), list(chats), special
        self.tokens_per_step, self.seed = tokens_per_step, seed
        self.chat_share, self.fill_in_share = chat_share, fill_in_share
        self.phases = list(phases)
        self.steps = max(1, token_budget // tokens_per_step)
        shares = np.cumsum([phase.share for phase in self.phases])
        self.phase_ends = [round(self.steps * share) for share in shares / shares[-1]]
        self._epochs: dict[tuple[int, int], Tokens] = {}

    def digest(self) -> str:
        """Return the SHA-256, in hexadecimal, of everything that determines the batches."""
        state = hashlib.sha256()
        settings = (self.phases, self.steps, self.tokens_per_step, self.seed)
        state.update(repr((*settings, self.chat_share, self.fill_in_share)).encode())
        for document in (*self.documents, *self.chats):
            state.update(len(document).to_bytes(8, "little"))
            state.update(document.astype("<u2").tobytes())
        return state.hexdigest()

    def context_length(self, step: int) -> int:
        """Return the context length, in tokens, of a step."""
        return self.phases[self._phase(step)].context_length

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return inputs and targets, int64 ``(rows, context_length)``; IndexError past the end."""
        phase = self._phase(step)
        rows = max(1, self.tokens_per_step // self.phases[phase].context_length)
        first_step = self.phase_ends[phase - 1] if phase else 0
        start = (step - first_step) * rows
        windows = [self._window(phase, row) for row in range(start, start + rows)]
        batch = np.stack(windows).astype(np.int64)
        return batch[:, :-1], batch[:, 1:]

    def _phase(self, step: int) -> int:
        if not 0 <= step < self.steps:
            raise IndexError(f"step {step} is not one of {self.steps}")
        return bisect.bisect_right(self.phase_ends, step)

    def _window(self, phase: int, row: int) -> Tokens:
        epoch = 0
        while row >= len(windows := self._epoch(phase, epoch)):
            row -= len(windows)
            epoch += 1
        window: Tokens = windows[row]
        return window

    def _epoch(self, phase: int, epoch: int) -> Tokens:
        """Return the windows of one epoch, uint16 ``(windows, context_length + 1)``."""
        if (phase, epoch) not in self._epochs:
            self._epochs[phase, epoch] = self._pack(phase, epoch)
        return self._epochs[phase, epoch]

    def _pack(self, phase: int, epoch: int) -> Tokens:
        generator = np.random.default_rng((self.seed, phase, epoch))
        length = self.phases[phase].context_length
        share = self.fill_in_share if phase or epoch else 0.0
        parts = [self._arrange(document, length, share, generator) for document in self.documents]
        end = np.array([self.special.end_of_text], dtype=np.uint16)
        parts += [np.concatenate((chat, end)) for chat in self._choose_chats(generator)]
        stream = np.concatenate([parts[index] for index in generator.permutation(len(parts))])
        starts = np.arange(0, len(stream) - length, length)
        if not len(starts):
            raise ValueError(f"{len(stream)} tokens do not fill a window of {length}")
        generator.shuffle(starts)
        windows: Tokens = np.lib.stride_tricks.sliding_window_view(stream, length + 1)[starts]
        return windows

    def _choose_chats(self, generator: np.random.Generator) -> list[Tokens]:
        plain_tokens = sum(len(document) for document in self.documents)
        allowance = plain_tokens * self.chat_share / (1 - self.chat_share)
        chosen: list[Tokens] = []
        for index in generator.permutation(len(self.chats)):
            allowance -= len(self.chats[index]) + 1
            if allowance < 0:
                break
            chosen.append(self.chats[index])
        return chosen

    def _arrange(
        self, document: Tokens, length: int, share: float, generator: np.random.Generator
    ) -> Tokens:
        if generator.random() < share:
            return fill_in_the_middle(document, length // 2, self.special, generator)
        return np.append(document, np.uint16(self.special.end_of_text))
