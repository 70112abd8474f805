"""What comes back: tokens with log-probabilities, updates of a step, results of a request."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

FinishReason = Literal["stop", "length", "abort", "error"]


class TokenLogprobs(NamedTuple):
    """Log-probabilities (natural logarithm) at one position, of the unmodified distribution."""

    token_id: int
    logprob: float
    rank: int
    """1 for the most likely token."""
    top: tuple[tuple[int, float], ...]
    """(token id, log-probability), most likely first."""


class Logprob(NamedTuple):
    """One entry of a result's logprob dictionaries (the field names are vLLM's)."""

    logprob: float
    rank: int
    decoded_token: str | None


@dataclass(slots=True)
class SequenceUpdate:
    """What one step added to one sequence of a request.

    ``text`` holds only characters that later tokens cannot change.
    """

    request_id: str
    index: int
    token_ids: list[int]
    text: str = ""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    embedding: npt.NDArray[np.float32] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    error: str | None = None
    request_finished: bool = False
    metrics: RequestMetrics | None = None


@dataclass(slots=True)
class RequestMetrics:
    """Times in seconds on the engine's clock; ``None`` where it has not happened.

    Of ``num_draft_tokens`` that were guessed, ``num_accepted_tokens`` were right.
    """

    arrival_time: float
    first_scheduled_time: float | None = None
    first_token_time: float | None = None
    finished_time: float | None = None
    num_cached_tokens: int = 0
    num_preemptions: int = 0
    num_draft_tokens: int = 0
    num_accepted_tokens: int = 0


@dataclass(slots=True)
class CompletionOutput:
    """One of a request's ``n`` completions."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[dict[int, Logprob]] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None

    def finished(self) -> bool:
        """Whether no more tokens will come."""
        return self.finish_reason is not None


@dataclass(slots=True)
class RequestOutput:
    """The state of a request: cumulative, complete when ``finished``."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[dict[int, Logprob] | None] | None = None
    embedding: npt.NDArray[np.float32] | None = None
    metrics: RequestMetrics | None = None
    error: str | None = None
