"""Every field of ``SamplingParams``: what is taken, what is refused, and by which name."""

from __future__ import annotations

import dataclasses
import math
import pickle
from typing import Any

import numpy as np
import pytest

from headrace.contracts.sampling import (
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_SAMPLES,
    MAX_STOP_BYTES,
    MAX_STOP_STRINGS,
    SamplingParams,
)
from headrace.contracts.step import PlanRow, SampleState, StepPlan
from headrace.errors import InvalidRequestError

NO_INTEGERS = ("1", 1.0, True, [1], None)
NO_NUMBERS = ("0.5", True, [0.5], None, math.nan, math.inf, -math.inf, 0.5j)
NO_BOOLEANS = (0, 1, "true", None)

ACCEPTED: dict[str, tuple[Any, ...]] = {
    "n": (1, 2, MAX_SAMPLES),
    "max_tokens": (0, 1, 10**9, None),
    "min_tokens": (0, 1, 16),
    "temperature": (0, 0.0, 1e-300, 1, 2.5, 100),
    "top_p": (1e-9, 0.5, 1, 1.0),
    "top_k": (-1, 0, 1, 10**30),
    "min_p": (0, 0.0, 0.3, 1),
    "repetition_penalty": (0.01, 1, 1.5, 100),
    "presence_penalty": (-2, 0, 1.5, 2),
    "frequency_penalty": (-2, 0, 1.5, 2),
    "logit_bias": (None, {}, {0: 100, 7: -100.0}, dict.fromkeys(range(MAX_LOGIT_BIAS), 0.0)),
    "seed": (None, 0, -(2**63), 2**63 - 1),
    "stop": (
        None,
        (),
        "end",
        ["a", "b"],
        ("é" * (MAX_STOP_BYTES // 2),),
        ["x"] * MAX_STOP_STRINGS,
    ),
    "stop_token_ids": (None, (), [3, 4], (0,), list(range(MAX_STOP_BYTES))),
    "ignore_eos": (True, False),
    "logprobs": (None, 0, 5, MAX_LOGPROBS),
    "prompt_logprobs": (None, 0, 5, MAX_LOGPROBS),
    "skip_special_tokens": (True, False),
    "include_stop_str_in_output": (True, False),
    "detokenize": (True, False),
}

REFUSED: dict[str, tuple[Any, ...]] = {
    "n": (*NO_INTEGERS, 0, -1, MAX_SAMPLES + 1),
    "max_tokens": (*NO_INTEGERS[:-1], -1, -(10**30)),
    "min_tokens": (*NO_INTEGERS, -1, 17),
    "temperature": (*NO_NUMBERS, -0.1, -1e-300, 100.1, 10**400),
    "top_p": (*NO_NUMBERS, 0, 0.0, -0.5, 1.0001),
    "top_k": (*NO_INTEGERS, -2, -1.0),
    "min_p": (*NO_NUMBERS, -0.1, 1.1),
    "repetition_penalty": (*NO_NUMBERS, 0, -1.0, 101),
    "presence_penalty": (*NO_NUMBERS, -2.1, 2.1),
    "frequency_penalty": (*NO_NUMBERS, -2.1, 2.1),
    "logit_bias": (
        [1],
        "1",
        {"1": 1.0},
        {-1: 1.0},
        {True: 1.0},
        {1.0: 1.0},
        {1: 100.5},
        {1: -101},
        {1: math.nan},
        {1: "1"},
        {1: None},
        dict.fromkeys(range(MAX_LOGIT_BIAS + 1), 0.0),
    ),
    "seed": (*NO_INTEGERS[:-1], -(2**63) - 1, 2**63),
    "stop": (
        5,
        [5],
        [None],
        {"a"},
        b"end",
        "",
        ["a", ""],
        "x" * (MAX_STOP_BYTES + 1),
        "é" * (MAX_STOP_BYTES // 2 + 1),
        ["x"] * (MAX_STOP_STRINGS + 1),
        ["x"] * 10_000,
    ),
    "stop_token_ids": (
        5,
        "5",
        b"ab",
        ["5"],
        [1.0],
        [True],
        [None],
        {1},
        [1] * (MAX_STOP_BYTES + 1),
    ),
    "ignore_eos": NO_BOOLEANS,
    "logprobs": (*NO_INTEGERS[:-1], -1, MAX_LOGPROBS + 1),
    "prompt_logprobs": (*NO_INTEGERS[:-1], -1, MAX_LOGPROBS + 1),
    "skip_special_tokens": NO_BOOLEANS,
    "include_stop_str_in_output": NO_BOOLEANS,
    "detokenize": NO_BOOLEANS,
}


def brief(value: object) -> str:
    return repr(value)[:30]


def pairs(table: dict[str, tuple[Any, ...]]) -> list[Any]:
    return [
        pytest.param(field, value, id=f"{field}-{brief(value)}")
        for field, values in table.items()
        for value in values
    ]


def test_the_tables_are_complete() -> None:
    names = set(SamplingParams.field_names())
    assert names == {field.name for field in dataclasses.fields(SamplingParams)}
    assert names == ACCEPTED.keys() == REFUSED.keys()


@pytest.mark.parametrize(("field", "value"), pairs(ACCEPTED))
def test_taken(field: str, value: Any) -> None:
    params = SamplingParams(**{field: value})
    if field == "stop":
        assert params.stop_strings == ((value,) if isinstance(value, str) else tuple(value or ()))
    elif field == "stop_token_ids":
        assert params.stop_ids == tuple(value or ())
    elif field == "top_k":
        assert params.top_k == max(value, 0)
    else:
        assert getattr(params, field) == value


@pytest.mark.parametrize(("field", "value"), pairs(REFUSED))
def test_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        SamplingParams(**{field: value})
    assert caught.value.field == field
    assert str(caught.value).startswith(f"{field}: ")
    assert len(caught.value.message) > 5


def test_numbers_of_numpy_are_refused_or_right() -> None:
    assert SamplingParams(temperature=np.float64(0.5)).temperature == 0.5
    with pytest.raises(InvalidRequestError):
        SamplingParams(n=np.int64(2))


def test_min_tokens_has_no_limit_of_its_own() -> None:
    assert SamplingParams(max_tokens=None, min_tokens=10**6).min_tokens == 10**6
    with pytest.raises(InvalidRequestError, match=r"^min_tokens: .*between 0 and 5, got 6"):
        SamplingParams(max_tokens=5, min_tokens=6)


def test_stop_strings_need_text() -> None:
    with pytest.raises(InvalidRequestError, match=r"^stop: .*detokenize"):
        SamplingParams(stop="x", detokenize=False)


def test_they_are_frozen() -> None:
    params = SamplingParams(stop=["a"], stop_token_ids=[1])
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.n = 2  # type: ignore[misc]
    assert params == SamplingParams(stop=("a",), stop_token_ids=(1,))
    assert dataclasses.replace(params, n=3).stop_strings == ("a",)
    assert pickle.loads(pickle.dumps(params)) == params


@pytest.mark.parametrize("temperature", [0, 0.0, 1e-300, 0.7])
def test_greedy_is_temperature_zero(temperature: float) -> None:
    assert SamplingParams(temperature=temperature).greedy == (temperature == 0)


def test_end_tokens_are_banned_below_min_tokens() -> None:
    state = SampleState(SamplingParams(min_tokens=2), [1], [], 0, (7, 9))
    banned = []
    for _ in range(4):
        banned.append(state.banned_token_ids)
        state.output_token_ids.append(5)
    assert banned == [(7, 9), (7, 9), (), ()]


def test_a_plan_counts_its_inputs() -> None:
    rows = [PlanRow(0, 0, [1, 2, 3], range(3), 0), PlanRow(1, 1, [4], range(9, 10), 9)]
    assert StepPlan(rows).num_inputs == 4
    assert StepPlan().num_inputs == 0
