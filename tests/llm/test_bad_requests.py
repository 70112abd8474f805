"""Every wrong request is refused before any work, with the name of its field."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from headrace import LLM, SamplingParams
from headrace.errors import ConfigurationError, InvalidRequestError
from tests.llm.conftest import MakeAsyncLLM, MakeLLM

GOOD = SamplingParams(max_tokens=2, temperature=0.0)

PARAMS: list[tuple[str, Any]] = [
    *((field, value) for field in ("n", "max_tokens") for value in (-1, 1.5, "3", True, [1])),
    ("n", 0),
    ("n", None),
    ("n", 10**6),
    ("max_tokens", 10**30),
    ("min_tokens", -1),
    ("min_tokens", 17),
    ("min_tokens", None),
    ("temperature", -0.1),
    ("temperature", float("nan")),
    ("temperature", float("inf")),
    ("temperature", 1e6),
    ("temperature", "hot"),
    ("temperature", None),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_p", True),
    ("top_k", -2),
    ("top_k", 0.5),
    ("min_p", -0.1),
    ("min_p", 1.1),
    ("repetition_penalty", 0.0),
    ("repetition_penalty", -1.0),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("seed", 2**63),
    ("seed", 0.5),
    ("logprobs", -1),
    ("logprobs", 10**9),
    ("prompt_logprobs", -1),
    ("prompt_logprobs", "1"),
    ("stop", ["x"] * 10_000),
    ("stop", [""]),
    ("stop", ["x" * 10_000]),
    ("stop", 5),
    ("stop", ["a", 5]),
    ("stop", b"bytes"),
    ("stop_token_ids", list(range(10_000))),
    ("stop_token_ids", [4096]),
    ("stop_token_ids", [-1]),
    ("stop_token_ids", ["1"]),
    ("stop_token_ids", 7),
    ("logit_bias", {4096: 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {"1": 1.0}),
    ("logit_bias", {1: 101.0}),
    ("logit_bias", {1: float("nan")}),
    ("logit_bias", {1: "much"}),
    ("logit_bias", [1]),
    ("logit_bias", dict.fromkeys(range(4097), 1.0)),
    ("ignore_eos", 1),
    ("skip_special_tokens", "yes"),
    ("include_stop_str_in_output", None),
    ("detokenize", 1),
]

PROMPTS: dict[str, tuple[str, Any]] = {
    "empty text": ("prompt", ""),
    "no tokens": ("prompt", [[]]),
    "no tokens in a dictionary": ("prompt", {"prompt_token_ids": []}),
    "too many tokens": ("prompt", [5] * 1025),
    "a context without room": ("prompt", [5] * 1024),
    "an unknown token": ("prompt", [5, 4096]),
    "a negative token": ("prompt", [5, -1]),
    "a huge token": ("prompt", [5, 2**80]),
    "a number": ("prompt", 5),
    "nothing": ("prompt", None),
    "bytes": ("prompt", b"abc"),
    "half a token": ("prompt", [[1.5]]),
    "a truth": ("prompt", [[True, False]]),
    "a list in a list in a list": ("prompt", [[[1]]]),
    "an empty dictionary": ("prompt", {}),
    "both forms": ("prompt", {"prompt": "a", "prompt_token_ids": [5]}),
    "an unknown key": ("prompt", {"prompt": "a", "multi_modal_data": object()}),
    "ids as text": ("prompt", {"prompt": [5]}),
    "text as ids": ("prompt_token_ids", {"prompt_token_ids": "abc"}),
    "a lone surrogate": ("prompt", "\ud800"),
}


def refused(field: str, call: Callable[[], object]) -> str:
    """Assert that ``call`` refuses because of ``field``; the message."""
    with pytest.raises(InvalidRequestError) as caught:
        call()
    assert caught.value.field == field
    assert str(caught.value) == f"{field}: {caught.value.message}"
    return caught.value.message


@pytest.mark.parametrize(("field", "value"), PARAMS, ids=lambda v: repr(v)[:30])
def test_wrong_parameters(llm: LLM, field: str, value: Any) -> None:
    before = llm.stats()
    message = refused(
        field, lambda: llm.generate(["abc", "def"], [GOOD, SamplingParams(**{field: value})])
    )
    assert message
    assert llm.stats() == before


def test_every_parameter_is_tried(llm: LLM) -> None:
    assert {field for field, _ in PARAMS} == {f.name for f in dataclasses.fields(SamplingParams)}


@pytest.mark.parametrize("name", PROMPTS)
def test_wrong_prompts(llm: LLM, name: str) -> None:
    field, prompt = PROMPTS[name]
    before = llm.stats()
    assert refused(field, lambda: llm.generate(prompt, GOOD))
    assert llm.stats() == before


@pytest.mark.parametrize("name", PROMPTS)
def test_wrong_prompts_of_a_stream(make_async_llm: MakeAsyncLLM, name: str) -> None:
    field, prompt = PROMPTS[name]
    if isinstance(prompt, list) and len(prompt) == 1:
        [prompt] = prompt
    llm = make_async_llm()

    async def generate() -> None:
        async for _ in llm.generate(prompt, GOOD):
            raise AssertionError("it ran")

    refused(field, lambda: asyncio.run(generate()))
    refused(field, lambda: llm.check(prompt, GOOD))
    assert llm.stats().prompt_tokens == 0


@pytest.mark.parametrize("params", [{"temperature": 0}, "greedy", 5, [GOOD, {"n": 1}], [None] * 2])
def test_parameters_of_another_type(llm: LLM, make_async_llm: MakeAsyncLLM, params: Any) -> None:
    refused("sampling_params", lambda: llm.generate(["abc", "def"], params))
    refused("sampling_params", lambda: make_async_llm().check("abc", params))


def test_as_many_parameters_as_prompts(llm: LLM) -> None:
    message = refused("sampling_params", lambda: llm.generate(["abc", "def"], [GOOD] * 3))
    assert message == "3 were given for 2 prompts"


@pytest.mark.parametrize("priority", ["high", 1.5, None])
def test_a_priority_of_another_type(llm: LLM, priority: Any) -> None:
    refused("priority", lambda: llm.generate(["abc", "def"], GOOD, priority=priority))


def test_one_wrong_prompt_keeps_all_from_running(llm: LLM) -> None:
    before = llm.stats()
    refused("prompt", lambda: llm.generate(["abc", "def", ""], GOOD))
    refused("max_tokens", lambda: llm.generate(["a", "b"], [GOOD, SamplingParams(max_tokens=5000)]))
    assert llm.stats() == before


@pytest.mark.parametrize(
    "messages", ["Hello", ["Hello"], [["Hello"]], [5], 5, None, [[]], [{"role": "user"}, "Hello"]]
)
def test_wrong_conversations(llm: LLM, messages: Any) -> None:
    assert refused("messages", lambda: llm.chat(messages, GOOD))


def test_messages_say_what_would_work(llm: LLM) -> None:
    message = refused("max_tokens", lambda: llm.generate([5] * 1000, SamplingParams(max_tokens=99)))
    assert "ask for at most 24" in message
    message = refused("prompt", lambda: llm.generate([5] * 2000, GOOD))
    assert "2000" in message and "1024" in message


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kv_cache_memory_bytes": 1000}, "kv_cache_memory_bytes: 0 pages of 65536 bytes"),
        ({"kv_cache_memory_bytes": 0}, "kv_cache_memory_bytes: .*at least 1"),
        ({"max_model_len": 2000}, "max_model_len: 2000 tokens need more KV memory"),
        ({"max_model_len": 10**6}, "max_model_len: 1000000 exceeds the model's context of 2048"),
        ({"max_num_seqs": "many"}, "max_num_seqs: must be an integer"),
        ({"max_num_seqs": 0}, "max_num_seqs: .*at least 1"),
        ({"scheduling_policy": "fair"}, "scheduling_policy: unknown scheduling policy 'fair'"),
        ({"dtype": "int3"}, "dtype: must be one of"),
        ({"dtype": "bfloat16", "reference": True}, "dtype: reference mode computes in float32"),
        ({"memory_utilization": 1.5}, r"memory_utilization: must be in \(0, 1\]"),
    ],
)
def test_options_that_cannot_work(make_llm: MakeLLM, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make_llm(**options)


def test_an_unknown_option_is_an_error(make_llm: MakeLLM) -> None:
    with pytest.raises(TypeError, match="gpu_memory"):
        make_llm(gpu_memory=0.9)


def test_memory_for_fewer_pages_than_a_prompt_needs(make_llm: MakeLLM) -> None:
    llm = make_llm(kv_cache_memory_bytes=3 * 65536)
    assert llm.model_info.max_model_len == 48
    message = refused("prompt", lambda: llm.generate([5] * 60, GOOD))
    assert "60" in message and "48" in message
    (result,) = llm.generate([5] * 40, SamplingParams(max_tokens=8, ignore_eos=True))
    assert len(result.outputs[0].token_ids) == 8
