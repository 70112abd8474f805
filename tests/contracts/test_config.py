"""The engine's options: ranges, and the option that an error names."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest

from headrace.config import EngineConfig
from headrace.errors import ConfigurationError

AT_LEAST_ONE = ("max_num_seqs", "block_size", "max_num_waiting")
OPTIONAL_AT_LEAST_ONE = (
    "max_model_len",
    "max_num_batched_tokens",
    "kv_cache_memory_bytes",
    "num_threads",
)
REFUSED = [
    *(
        (field, value)
        for field in (*AT_LEAST_ONE, *OPTIONAL_AT_LEAST_ONE)
        for value in (0, -1, "4", 2.5, True)
    ),
    *(("memory_utilization", value) for value in (0.0, -0.5, 1.01, math.nan, math.inf)),
    *(("dtype", value) for value in ("fp16", "float64", "", "Float32")),
    *(("kv_cache_dtype", value) for value in ("bfloat16", "fp8", "", None)),
    *((field, "no") for field in ("enable_prefix_caching", "reference", "seed")),
    *((field, 3) for field in ("device", "scheduling_policy")),
]
ACCEPTED = [
    *((field, 1) for field in (*AT_LEAST_ONE, *OPTIONAL_AT_LEAST_ONE)),
    *((field, None) for field in OPTIONAL_AT_LEAST_ONE),
    *(("memory_utilization", value) for value in (1e-6, 0.5, 1, 1.0)),
    *(("dtype", value) for value in ("auto", "float32", "bfloat16", "float16")),
    *(("kv_cache_dtype", value) for value in ("auto", "int8")),
]


@pytest.mark.parametrize(("field", "value"), REFUSED)
def test_refused_by_name(field: str, value: Any) -> None:
    with pytest.raises(ConfigurationError, match=rf"^{field}: ") as caught:
        EngineConfig(**{field: value})
    assert repr(value) in str(caught.value)


@pytest.mark.parametrize(("field", "value"), ACCEPTED)
def test_taken(field: str, value: Any) -> None:
    assert getattr(EngineConfig(**{field: value}), field) == value


def test_the_cache_follows_the_computation() -> None:
    assert EngineConfig().cache_dtype("bfloat16") == "bfloat16"
    assert EngineConfig(kv_cache_dtype="int8").cache_dtype("bfloat16") == "int8"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_reference_mode_is_exact(dtype: str) -> None:
    assert EngineConfig(reference=True).dtype == "auto"
    assert EngineConfig(reference=True, dtype="float32").reference
    with pytest.raises(ConfigurationError, match=r"^dtype: .*float32"):
        EngineConfig(reference=True, dtype=dtype)


def test_it_is_frozen_and_checked_again_when_replaced() -> None:
    config = EngineConfig()
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.seed = 1  # type: ignore[misc]
    with pytest.raises(ConfigurationError, match="block_size"):
        dataclasses.replace(config, block_size=0)


def test_every_option_is_described() -> None:
    text = EngineConfig.__doc__ or ""
    described = {
        name.strip()
        for line in text.splitlines()
        if ": " in line
        for name in line.partition(": ")[0].split(",")
    }
    assert {field.name for field in dataclasses.fields(EngineConfig)} <= described
