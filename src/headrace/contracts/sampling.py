"""What a caller asks of generation: ``SamplingParams``. Field names follow vLLM's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from headrace.errors import InvalidRequestError

MAX_STOP_STRINGS = 64
MAX_STOP_BYTES = 1024
MAX_LOGPROBS = 1024
MAX_SAMPLES = 128
MAX_LOGIT_BIAS = 4096
_SEED_LIMIT = 2**63


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is sampled and when it ends.

    Args:
        n: completions per prompt; they share the prompt's pages.
        max_tokens: tokens to generate at most; ``None`` means up to the context's end.
            0 generates nothing (useful with ``prompt_logprobs``).
        min_tokens: end-of-sequence and stop tokens cannot be sampled before this many tokens.
        temperature: 0 is greedy.
        top_p: keep the likeliest tokens that together have this probability; 1 keeps all.
        top_k: keep this many of the likeliest tokens; 0 or -1 keeps all.
        min_p: keep tokens at least this many times as likely as the likeliest; 0 keeps all.
        repetition_penalty: > 0; divides positive logits (multiplies negative ones) of tokens
            seen in prompt or output (CTRL, section 4.1).
        presence_penalty, frequency_penalty: in [-2, 2], subtracted per output token seen.
        logit_bias: token id -> addend in [-100, 100].
        seed: makes sampling of this request reproducible; its draws depend on nothing else, but for
            methods that guess tokens on what they guess.
        stop: strings that end the generation.
        stop_token_ids: token ids that end it.
        ignore_eos: go on past the end-of-sequence token.
        logprobs: number of alternatives to report for each generated token, beside its own.
        prompt_logprobs: the same for the prompt's tokens.
        include_stop_str_in_output: let the text end with the stop string or end token.
        skip_special_tokens: leave special tokens out of the text.
        detokenize: produce text at all.

    Raises:
        InvalidRequestError: a field has the wrong type or range; the error names it.
    """

    n: int = 1
    max_tokens: int | None = 16
    min_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    stop: str | Sequence[str] | None = None
    stop_token_ids: Sequence[int] | None = None
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    detokenize: bool = True

    def __post_init__(self) -> None:
        self._normalise()
        self._check_numbers()
        self._check_stops()
        self._check_logit_bias()

    def _set(self, field: str, value: Any) -> None:
        object.__setattr__(self, field, value)

    def _normalise(self) -> None:
        """Give every optional collection one immutable form."""
        stop = self.stop
        if stop is None:
            stop = ()
        elif isinstance(stop, str):
            stop = (stop,)
        elif not isinstance(stop, Sequence) or not all(isinstance(s, str) for s in stop):
            raise InvalidRequestError("stop", "must be a string or a list of strings")
        self._set("stop", tuple(stop))
        ids = self.stop_token_ids
        if ids is None:
            ids = ()
        elif (
            not isinstance(ids, Sequence)
            or isinstance(ids, (str, bytes))
            or not all(_is_integer(i) for i in ids)
        ):
            raise InvalidRequestError("stop_token_ids", "must be a list of token ids")
        self._set("stop_token_ids", tuple(ids))
        if _is_integer(self.top_k) and self.top_k == -1:
            self._set("top_k", 0)

    def _check_numbers(self) -> None:
        _integer("n", self.n, 1, MAX_SAMPLES)
        if self.max_tokens is not None:
            _integer("max_tokens", self.max_tokens, 0, None)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0, above=True)
        _integer("top_k", self.top_k, 0, None)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.0, 100.0, above=True)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if self.seed is not None:
            _integer("seed", self.seed, -_SEED_LIMIT, _SEED_LIMIT - 1)
        if self.logprobs is not None:
            _integer("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _integer("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)
        for field in (
            "ignore_eos",
            "skip_special_tokens",
            "include_stop_str_in_output",
            "detokenize",
        ):
            if not isinstance(getattr(self, field), bool):
                raise InvalidRequestError(field, "must be true or false")

    def _check_stops(self) -> None:
        stop = self.stop_strings
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequestError(
                "stop", f"at most {MAX_STOP_STRINGS} strings are taken, got {len(stop)}"
            )
        if any(not s for s in stop):
            raise InvalidRequestError("stop", "a stop string must not be empty")
        if any(len(s.encode("utf-8", "surrogatepass")) > MAX_STOP_BYTES for s in stop):
            raise InvalidRequestError("stop", f"a stop string has at most {MAX_STOP_BYTES} bytes")
        if stop and not self.detokenize:
            raise InvalidRequestError("stop", "stop strings need detokenize=True")
        if len(self.stop_ids) > MAX_STOP_BYTES:
            raise InvalidRequestError("stop_token_ids", f"at most {MAX_STOP_BYTES} ids are taken")

    def _check_logit_bias(self) -> None:
        if self.logit_bias is None:
            return
        if not isinstance(self.logit_bias, Mapping):
            raise InvalidRequestError("logit_bias", "must map token ids to numbers")
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequestError("logit_bias", f"at most {MAX_LOGIT_BIAS} entries are taken")
        for token, bias in self.logit_bias.items():
            if not _is_integer(token) or token < 0:
                raise InvalidRequestError("logit_bias", f"{token!r} is not a token id")
            _number("logit_bias", bias, -100.0, 100.0)

    @property
    def stop_strings(self) -> tuple[str, ...]:
        """``stop`` in its normal form."""
        assert isinstance(self.stop, tuple)
        return self.stop

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """``stop_token_ids`` in its normal form."""
        assert isinstance(self.stop_token_ids, tuple)
        return self.stop_token_ids

    @property
    def greedy(self) -> bool:
        """Whether the most likely token is always taken."""
        return self.temperature == 0.0

    @classmethod
    def field_names(cls) -> tuple[str, ...]:
        """The names of all fields, in declaration order."""
        return tuple(f.name for f in fields(cls))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _integer(field: str, value: object, low: int, high: int | None) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidRequestError(field, f"must be an integer, got {value!r}")
    if value < low or (high is not None and value > high):
        bound = f"at least {low}" if high is None else f"between {low} and {high}"
        raise InvalidRequestError(field, f"must be {bound}, got {value}")


def _number(field: str, value: object, low: float, high: float, above: bool = False) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidRequestError(field, f"must be a number, got {value!r}")
    inside = (low < value if above else low <= value) and value <= high
    if not inside:  # NaN is never inside
        edge = "above" if above else "at least"
        raise InvalidRequestError(
            field, f"must be {edge} {low:g} and at most {high:g}, got {value}"
        )
