"""Every architecture on a device that is not the CPU: tensors of the two never meet."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from headrace import LLM
from headrace.ops import attention
from headrace.ops.device import DTYPES, Device
from tests.exec.foreign_device import NAME, foreign_device
from tests.models.expected import Expected, greedy, load, prompt_of
from tests.models.test_embeddings import ENCODERS, randomize
from tests.support.adapters import write_factors
from tests.support.architectures import ARCHITECTURES, WINDOW
from tests.support.checkpoints import write_tokenizer

OPTIONS: dict[str, Any] = {
    "max_num_batched_tokens": 24,
    "block_size": 8,
    "kv_cache_memory_bytes": 1 << 20,
}


@pytest.fixture(autouse=True)
def same_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that other devices use, on the CPU too, so that not a bit may differ."""
    monkeypatch.setattr("headrace.ops.table.flash_kernel", attention.matmul_kernel)


@pytest.fixture
def abroad(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it lets engines that are made from then on find the device."""

    def enter() -> None:
        device = Device(NAME, 64, frozenset(DTYPES))
        monkeypatch.setattr("headrace.loading.resolve_device", lambda name: device)

    return enter


def generate(llm: LLM) -> list[Any]:
    """What prompts that take several steps give, with an adapter and without."""
    prompts = [prompt_of(length) for length in (2 * WINDOW, 3, 17)]
    outputs = llm.generate(prompts, greedy(4, n=2, logprobs=2), adapter=[None, "a", "a"])
    assert all(output.error is None for output in outputs)
    return [output.outputs for output in outputs]


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoders(
    name: str, expectations: Callable[[str], Expected], tmp_path: Path, abroad: Callable[[], None]
) -> None:
    directory = expectations(name).directory
    with load(directory) as llm:
        shapes = llm.adapters._bank._shapes
    options = {**OPTIONS, "adapters": {"a": write_factors(shapes, tmp_path / "a", 1)}}
    with load(directory, **options) as llm:
        expected = generate(llm)
    abroad()
    with foreign_device(), load(directory, **options) as llm:
        assert llm.model_info.device == NAME
        assert generate(llm) == expected


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    randomize(ENCODERS[request.param]()).save_pretrained(directory)
    write_tokenizer(directory)
    return directory


def embed(llm: LLM) -> Iterator[list[float]]:
    for output in llm.embed([prompt_of(length) for length in (40, 3, 17)]):
        assert output.embedding is not None
        yield output.embedding.tolist()


def test_encoders(encoder: Path, abroad: Callable[[], None]) -> None:
    options = {"kv_cache_memory_bytes": 1 << 20}
    with load(encoder, **options) as llm:
        expected = list(embed(llm))
    abroad()
    with foreign_device(), load(encoder, **options) as llm:
        assert list(embed(llm)) == expected
