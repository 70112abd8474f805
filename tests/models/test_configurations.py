"""What a ``config.json`` may say: windows by pattern, and nonsense, which is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from headrace.errors import CheckpointError
from headrace.models.base import find_architecture
from headrace.ops.device import resolve_device
from headrace.ops.linear import Linear
from headrace.ops.table import Ops, make_ops
from headrace.weights.absent_linear import AbsentLinear
from tests.models.test_embeddings import ENCODERS
from tests.support.checkpoints import ALL_CONFIGS

NONSENSE: Sequence[Any] = (None, "x", -1, 0, 1, 7, 1.5, True, [], [1], ["x"], {}, {"x": 1})
REFUSED_BY_ITSELF = {"model_type"}


class AnyWeights:
    """A ``WeightSource`` of any model, in which everything has the shape that is asked for."""

    def __contains__(self, name: str) -> bool:
        return True

    def tensor(self, name: str, shape: Sequence[int], dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(tuple(shape), dtype=dtype or torch.float32, device="meta")

    def vector(self, name: str, size: int) -> Tensor:
        return self.tensor(name, (size,))

    def embedding(self, name: str, rows: int, columns: int) -> Callable[[Tensor], Tensor]:
        return AbsentLinear().rows

    def head(self, name: str, rows: int, columns: int, *, bias: bool = False) -> Linear:
        return AbsentLinear()

    def linear(
        self, names: Sequence[str], rows: Sequence[int], columns: int, **options: Any
    ) -> Linear:
        assert len(options.get("order") or range(sum(rows))) == sum(rows)
        return AbsentLinear()


@pytest.fixture(scope="module")
def ops() -> Ops:
    return make_ops(resolve_device("cpu"), "float32", threads=1)


def build(config: dict[str, Any], ops: Ops) -> None:
    """All that loading makes of a configuration before it reads weights."""
    architecture = find_architecture(config)
    architecture.shape(config)
    architecture.layer_states(config, "float32")
    architecture(config, AnyWeights(), ops)


def config_of(config: transformers.PreTrainedConfig, directory: Path) -> dict[str, Any]:
    """As it is written to ``config.json``."""
    config.save_pretrained(directory)
    found: dict[str, Any] = json.loads((directory / "config.json").read_text())
    return found


def make_config(name: str) -> transformers.PreTrainedConfig:
    return ALL_CONFIGS[name]() if name in ALL_CONFIGS else ENCODERS[name]().config


def variations(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each field, and each field of a set of fields, left out or with nonsense in it."""
    for field in config.keys() - REFUSED_BY_ITSELF:
        others = {key: value for key, value in config.items() if key != field}
        yield f"no {field}", others
        for value in NONSENSE:
            yield f"{field}: {value!r}", {**others, field: value}
        if isinstance(config[field], dict):
            for what, inner in variations(config[field]):
                yield f"{field}: {what}", {**others, field: inner}


def fault(config: dict[str, Any], ops: Ops) -> str | None:
    """What is wrong with how a configuration is taken: ``None`` if it is built or refused."""
    try:
        build(config, ops)
    except CheckpointError as error:
        return None if str(error).startswith("config.json") else str(error)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return None


@pytest.mark.parametrize("name", [*ALL_CONFIGS, *ENCODERS])
def test_nonsense_is_refused_or_does_not_matter(name: str, tmp_path: Path, ops: Ops) -> None:
    config = config_of(make_config(name), tmp_path)
    build(config, ops)
    found = {what: fault(each, ops) for what, each in variations(config)}
    assert {what: wrong for what, wrong in found.items() if wrong} == {}


LAYERS = 12
WINDOWS: dict[str, Callable[[], transformers.PreTrainedConfig]] = {
    "qwen2": lambda: transformers.Qwen2Config(
        num_hidden_layers=LAYERS, use_sliding_window=True, sliding_window=20, max_window_layers=3
    ),
    "qwen2, all": lambda: transformers.Qwen2Config(
        num_hidden_layers=LAYERS, use_sliding_window=True, sliding_window=20, max_window_layers=0
    ),
    "qwen2, none": lambda: transformers.Qwen2Config(num_hidden_layers=LAYERS, max_window_layers=3),
    "qwen3": lambda: transformers.Qwen3Config(
        num_hidden_layers=LAYERS, use_sliding_window=True, sliding_window=20, max_window_layers=3
    ),
    "qwen2_moe": lambda: transformers.Qwen2MoeConfig(
        num_hidden_layers=LAYERS, use_sliding_window=True, sliding_window=20, max_window_layers=7
    ),
    "smollm3": lambda: transformers.SmolLM3Config(
        num_hidden_layers=LAYERS, use_sliding_window=True, sliding_window=20
    ),
    "smollm3, none": lambda: transformers.SmolLM3Config(num_hidden_layers=LAYERS),
    "gemma2": lambda: transformers.Gemma2Config(num_hidden_layers=LAYERS),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(num_hidden_layers=LAYERS),
    "gpt_oss": lambda: transformers.GptOssConfig(num_hidden_layers=LAYERS),
}


@pytest.mark.parametrize("name", WINDOWS)
def test_windows_by_pattern_are_those_that_are_listed(name: str) -> None:
    """Older files do not say ``layer_types``."""
    config = WINDOWS[name]().to_dict()
    parse: Any = find_architecture(config).parse  # type: ignore[attr-defined]
    listed = parse(config).windows
    kinds = config.pop("layer_types")
    assert parse(config).windows == listed
    wide = config["sliding_window"]
    assert listed == tuple(wide if kind == "sliding_attention" else None for kind in kinds)


def test_longrope_needs_its_factors() -> None:
    config = ALL_CONFIGS["phi3-longrope"]().to_dict()
    del config["rope_parameters"]["long_factor"]
    with pytest.raises(CheckpointError, match="lacks 'long_factor'"):
        build(config, make_ops(resolve_device("cpu"), "float32", threads=1))


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        (["sliding_attention"], "must name 2 layers"),
        ("sliding_attention", "must be a list"),
        (["sliding_attention", "chunked_attention"], "'chunked_attention' is not supported"),
    ],
)
def test_kinds_of_layers(kinds: Any, message: str) -> None:
    config = {**ALL_CONFIGS["mistral"]().to_dict(), "layer_types": kinds}
    with pytest.raises(CheckpointError, match=message):
        find_architecture(config).shape(config)
