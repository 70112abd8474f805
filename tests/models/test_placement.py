"""Weights and KV pages on disk: what comes out is what an engine in memory computes."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace import LLM
from headrace.config import EngineConfig
from headrace.disk import DiskFile
from headrace.errors import ConfigurationError
from headrace.kv.tiered_arena import TieredArena
from headrace.loading import quantize_model
from headrace.weights.streaming import WeightTier
from tests.models.expected import TOLERANCE, Expected, difference, greedy, load, prompt_of
from tests.support.adapters import write_adapter
from tests.support.checkpoints import ALL_CONFIGS, make_model, save_checkpoint
from tests.support.logits import LogitsRecorder

LAYERS = 5
PROMPTS = [prompt_of(length, 1) for length in (19, 14, 15, 27, 1)]
SMALL: dict[str, Any] = {
    "block_size": 16,
    "max_num_batched_tokens": 16,
    "max_num_seqs": 4,
    "max_model_len": 48,
}


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """A model of an odd number of layers."""
    config = ALL_CONFIGS["llama-biases"]()
    config.num_hidden_layers = LAYERS
    model = make_model(config)
    return Expected(model, save_checkpoint(model, tmp_path_factory.mktemp("deep")))


@pytest.fixture(autouse=True)
def speeds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk and a memory of known speed, which most tests need not measure."""
    monkeypatch.setattr("headrace.placing.measure_reading", lambda *_: 1e9)
    monkeypatch.setattr("headrace.placing.read_bandwidth", lambda *_, **__: 1e10)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A directory, which is left as it was found, as are threads and open files."""
    opened = open_files()
    directory = tmp_path / "disk"
    directory.mkdir()
    yield directory
    assert list(directory.iterdir()) == []
    assert not [each for each in threading.enumerate() if each.name.startswith("headrace-")]
    assert not [path for path in open_files() - opened if path.startswith(str(directory))]


def open_files() -> set[str]:
    """Paths of the files that this process has open; those without a name, too."""
    return {str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()}


def method(disk: Path, memory: int | str, **options: Any) -> tuple[str]:
    listed = "".join(f",{key}={str(value).lower()}" for key, value in options.items())
    return (f"flexgen:memory={memory},directory={disk}{listed}",)


def least_memory(directory: Path, disk: Path, options: dict[str, Any], **chosen: Any) -> int:
    """The smallest cap, as the message says it that refuses a smaller one."""
    with pytest.raises(ConfigurationError, match="flexgen: memory: at least") as raised:
        load(directory, methods=method(disk, 1, **chosen), **options)
    found = re.search(r"at least (\d+) bytes", str(raised.value))
    assert found is not None
    return int(found[1])


def tiers(llm: LLM) -> tuple[WeightTier, TieredArena]:
    """What is on disk of an engine that has both there."""
    weights, arena = llm.engine.runner.tiers  # type: ignore[attr-defined]
    assert isinstance(weights, WeightTier) and isinstance(arena, TieredArena)
    return weights, arena


def load_least(directory: Path, disk: Path, options: dict[str, Any], **chosen: Any) -> LLM:
    """An engine that has everything on disk that can be."""
    cap = least_memory(directory, disk, options, **chosen)
    llm = load(directory, methods=method(disk, cap, **chosen), **options)
    weights, arena = tiers(llm)
    assert weights.layers == arena.spilled == frozenset(range(LAYERS))
    return llm


Run = Callable[..., list[Tensor]]


def recorded(llm: LLM) -> Run:
    """What runs prompts, four tokens more each, and returns the logits of every completion."""
    recorder = LogitsRecorder(llm)

    def run(prompts: list[list[int]] = PROMPTS, **params: Any) -> list[Tensor]:
        outputs = llm.generate(prompts, greedy(4, **params))
        assert [output.error for output in outputs] == [None] * len(prompts)
        llm.engine.check_integrity()
        return [
            recorder.logits(output, index)
            for output in outputs
            for index in range(len(output.outputs))
        ]

    return run


def run(llm: LLM, prompts: list[list[int]] = PROMPTS) -> list[Tensor]:
    """The same, once."""
    return recorded(llm)(prompts)


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        pytest.param({}, {"micro_batch": 1}, id="one row at a time"),
        pytest.param({}, {"micro_batch": 3, "overlap": False}, id="no overlap"),
        pytest.param({"max_num_batched_tokens": 5}, {"micro_batch": 2}, id="chunks"),
        pytest.param(
            {"kv_cache_memory_bytes": 4 * 5 * 4096, "max_num_batched_tokens": 64},
            {"micro_batch": 2},
            id="preemption",
        ),
        pytest.param({"weights": "w4a8-g32-zp"}, {"micro_batch": 2}, id="w4a8"),
        pytest.param({"kv_cache_dtype": "int8"}, {"micro_batch": 1}, id="int8"),
        pytest.param({"enable_prefix_caching": False}, {"direct": False}, id="page cache"),
    ],
)
def test_bit_for_bit_in_reference_mode(
    deep: Expected, disk: Path, options: dict[str, Any], chosen: dict[str, Any]
) -> None:
    options = {**SMALL, "reference": True, **options}
    with load(deep.directory, **options) as llm:
        plain = run(llm)
    with load_least(deep.directory, disk, options, **chosen) as llm:
        placed = run(llm)
        preempted = llm.stats().preemptions
    assert (preempted > 0) == ("kv_cache_memory_bytes" in options)
    assert all(torch.equal(one, other) for one, other in zip(plain, placed, strict=True))


@pytest.mark.parametrize(
    "name", ["mixtral", "gemma2", "deepseek_v3", "falcon_h1", "mamba2", "gpt2"]
)
def test_architectures(name: str, tmp_path: Path, disk: Path) -> None:
    """Windows, experts, latent attention, recurrent states: as transformers computes them."""
    config = ALL_CONFIGS[name]()
    config.num_hidden_layers = max(4, config.num_hidden_layers)
    model = make_model(config)
    expected = Expected(model, save_checkpoint(model, tmp_path / name))
    cap = least_memory(expected.directory, disk, SMALL)
    with load(expected.directory, methods=method(disk, cap), **SMALL) as llm:
        # Recurrent states are no pages.
        assert len(llm.engine.runner.tiers) == (1 if name == "mamba2" else 2)  # type: ignore[attr-defined]
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(PROMPTS, greedy(6))
    assert max(difference(expected, recorder, output) for output in outputs) < TOLERANCE


def test_pages_alone_are_on_disk(expectations: Callable[[str], Expected], disk: Path) -> None:
    """Of two layers, both would have to be in memory."""
    expected = expectations("llama3")
    cap = least_memory(expected.directory, disk, SMALL)
    with load(expected.directory, methods=method(disk, cap), **SMALL) as llm:
        [arena] = llm.engine.runner.tiers  # type: ignore[attr-defined]
        assert arena.spilled == {0, 1}
        recorder = LogitsRecorder(llm)
        outputs = llm.generate(PROMPTS, greedy(6))
        assert arena.waited > 0
    assert max(difference(expected, recorder, output) for output in outputs) < TOLERANCE


def test_part_on_disk(deep: Expected, disk: Path) -> None:
    """Layers in memory and on disk take turns, and a larger cap has more of them in memory."""
    with load(deep.directory, **SMALL) as llm:
        plain = run(llm)
    cap = least_memory(deep.directory, disk, SMALL)
    found = []
    for memory in (cap + 100_000, cap + 200_000, cap + 300_000, 1 << 30):
        with load(deep.directory, methods=method(disk, memory), **SMALL) as llm:
            placement = llm.engine.runner._forward.builder._placement  # type: ignore[attr-defined]
            found.append(len(placement.streamed))
            for one, other in zip(plain, run(llm), strict=True):
                assert (one - other).abs().max() < TOLERANCE
    assert LAYERS == found[0] > found[1] > found[2] > found[3] == 0


@pytest.mark.parametrize("weights", ["bf16", "w8a8", "w4a8-g32-zp"])
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "packed"])
def test_formats(deep: Expected, disk: Path, tmp_path: Path, weights: str, packed: bool) -> None:
    """Native kernels on what was read: the same products, so the same logits to the bit."""
    directory = deep.directory
    options = {**SMALL, "dtype": "bfloat16", "weights": weights}
    if packed:
        directory = tmp_path / "packed"
        quantize_model(EngineConfig(model=str(deep.directory), weights=weights), directory)
    with load(directory, **options) as llm:
        plain = run(llm)
    with load_least(directory, disk, options, micro_batch=4) as llm:
        scratch = None in tiers(llm)[0]._files
        placed = run(llm)
    assert scratch != packed, "a packed checkpoint is read where it is"
    assert all(torch.equal(one, other) for one, other in zip(plain, placed, strict=True))


def test_more_pages_than_memory_holds(deep: Expected, disk: Path) -> None:
    options = {**SMALL, "max_num_seqs": 8, "max_num_batched_tokens": 64}
    prompts = [prompt_of(30, seed) for seed in range(8)]
    with load(deep.directory, **options) as llm:
        plain = run(llm, prompts)
    with load_least(deep.directory, disk, options, micro_batch=1) as llm:
        _, arena = tiers(llm)
        placed = run(llm, prompts)
        stats = llm.stats()
        held = len(arena._buffers) * len(arena._buffers[0]) + arena.num_bytes
    assert stats.preemptions == 0
    assert stats.pages_peak * LAYERS * 4096 > 3 * held, "what is in use fits into memory"
    for one, other in zip(plain, placed, strict=True):
        assert (one - other).abs().max() < TOLERANCE


def test_forks_prefixes_and_aborts(deep: Expected, disk: Path) -> None:
    """Completions part on disk too; a prefix is found there; an abort leaves the others alone."""
    shared = prompt_of(18)
    prompts = [shared, [*shared, 5], [*shared[:9], 7], prompt_of(3)]
    options = {**SMALL, "reference": True}
    results = []
    for placed in (False, True):
        plain = load(deep.directory, **options) if not placed else None
        with plain or load_least(deep.directory, disk, options, micro_batch=1) as llm:
            run_again = recorded(llm)
            first = run_again(prompts, n=2)
            llm.engine.add_request("late", prompts[0], greedy(20))
            for _ in range(4):
                llm.engine.step()
            assert llm.engine.abort_request("late")
            again = run_again(prompts)
            hits = llm.stats().prefix_hit_tokens
        results.append((first + again, hits))
    (plain_logits, _), (placed_logits, hits) = results
    assert hits > 0
    assert all(map(torch.equal, plain_logits, placed_logits))


@pytest.mark.parametrize("kind", ["headrace-weights", "headrace-kv"])
@pytest.mark.parametrize("overlap", [True, False])
def test_a_failed_read_fails_its_step(
    deep: Expected, disk: Path, monkeypatch: pytest.MonkeyPatch, kind: str, overlap: bool
) -> None:
    with load(deep.directory, **SMALL) as llm:
        plain = run(llm)
    with load_least(deep.directory, disk, SMALL, overlap=overlap) as llm:
        weights, arena = tiers(llm)
        tier: Any = weights if kind == "headrace-weights" else arena
        file = tier._file if tier is arena else tier._files[None]
        run_again = recorded(llm)
        before = run_again()
        read, left = DiskFile.read, [3]

        def fail(self: DiskFile, *arguments: Any) -> None:
            if self is file:
                left[0] -= 1
                if left[0] == 0:
                    raise OSError(5, "Input/output error")
            read(self, *arguments)

        monkeypatch.setattr(DiskFile, "read", fail)
        outputs = llm.generate(PROMPTS, greedy(6))
        monkeypatch.undo()
        failed = [output for output in outputs if output.error is not None]
        assert len(failed) > 0 and all("Input/output error" in str(o.error) for o in failed)
        assert left[0] <= 0
        after = run_again()
    for found in (before, after):
        for one, other in zip(plain, found, strict=True):
            assert (one - other).abs().max() < TOLERANCE


def test_a_failed_write_fails_its_step(
    deep: Expected, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a page lost is not computed with: the request that wrote it ends with the error."""
    with load_least(deep.directory, disk, SMALL) as llm:
        monkeypatch.setattr(DiskFile, "write", _no_space)
        [output] = llm.generate([PROMPTS[0]], greedy(2))
        monkeypatch.undo()
        assert output.error is not None and "No space left" in output.error
        run(llm)


def _no_space(*_: Any) -> None:
    raise OSError(28, "No space left on device")


def test_refusals(
    deep: Expected, disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    wrong = {
        "memory=1GiB": "name a directory for what goes to disk",
        "memory=much,directory=/": "memory: must be bytes, as in 512MiB or 536870912, got 'much'",
        "directory=/": "memory: must be bytes",
        f"memory=1GiB,directory={disk},micro_batch=-1": "micro_batch must be at least 0, got -1",
        f"memory=1GiB,directory={tmp_path / 'nowhere'}": "nowhere cannot be written: No such file",
    }
    for text, message in wrong.items():
        with pytest.raises(ConfigurationError, match=f"method: flexgen: .*{message}"):
            load(deep.directory, methods=(f"flexgen:{text}",), **SMALL)
    cap = least_memory(deep.directory, disk, SMALL)
    with pytest.raises(ConfigurationError, match=r"flexgen: memory: at least \d+ bytes"):
        load(deep.directory, methods=method(disk, cap - 1), **SMALL)
    small = load_least(deep.directory, disk, SMALL)
    small.close()
    small.close()
    # What comes too late leaves nothing behind either: weights are being read by then.
    scarce = {**SMALL, "kv_cache_memory_bytes": 2 * LAYERS * 4096}
    with pytest.raises(ConfigurationError, match="max_model_len: 48 tokens need more KV memory"):
        load_least(deep.directory, disk, scarce)
    pages = {**SMALL, "kv_cache_memory_bytes": 100 * LAYERS * 4096}
    larger = least_memory(deep.directory, disk, pages)
    monkeypatch.setattr("headrace.placing.measure_reading", lambda *_: 1e9)
    for free, options, memory in ((5000, SMALL, cap), (1_000_000, pages, larger)):
        usage = SimpleNamespace(free=free)
        monkeypatch.setattr("shutil.disk_usage", lambda _, usage=usage: usage)
        with pytest.raises(ConfigurationError, match=r"flexgen: .* GB have to go into .* are free"):
            load(deep.directory, methods=method(disk, memory), **options)


def test_the_disk_fills_while_weights_are_written(
    deep: Expected, disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cap = least_memory(deep.directory, disk, SMALL)
    monkeypatch.setattr(DiskFile, "write", _no_space)
    with pytest.raises(ConfigurationError, match=r"weights cannot be written to disk .No space"):
        load(deep.directory, methods=method(disk, cap), **SMALL)


def test_adapters_change_weights_from_disk(deep: Expected, disk: Path, tmp_path: Path) -> None:
    adapters = {name: write_adapter(deep.directory, tmp_path / name, len(name)) for name in "ab"}
    names = ["a", None, "b", "a", None]
    found = []
    for placed in (False, True):
        cap = least_memory(deep.directory, disk, SMALL, micro_batch=2) if placed else 1 << 40
        methods = method(disk, cap, micro_batch=2)
        with load(deep.directory, methods=methods, adapters=adapters, **SMALL) as llm:
            recorder = LogitsRecorder(llm)
            outputs = llm.generate(PROMPTS, greedy(3), adapter=names)
            found.append([recorder.logits(output) for output in outputs])
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() < TOLERANCE
    with load(deep.directory, **SMALL) as llm:
        plain = run(llm)
    assert (plain[0][:1] - found[1][0][:1]).abs().max() > 0.01 > TOLERANCE
    assert (plain[1][:1] - found[1][1][:1]).abs().max() < TOLERANCE


def test_taps_are_called_for_every_layer(deep: Expected, disk: Path) -> None:
    """Methods that work through taps see what they see in memory, in the same order."""
    kept = []
    for placed in (False, True):
        cap = least_memory(deep.directory, disk, SMALL) if placed else 1 << 40
        methods = ("activation-recorder", *method(disk, cap, micro_batch=1))
        with load(deep.directory, methods=methods, **SMALL) as llm:
            assert bool(llm.engine.runner.tiers) == placed  # type: ignore[attr-defined]
            llm.generate(PROMPTS, greedy(3))
            kept.append(llm.methods.taps["activation-recorder"].take())  # type: ignore[attr-defined]
    for layer in range(LAYERS):
        for one, other in zip(kept[0][layer], kept[1][layer], strict=True):
            assert (one - other).abs().max() < TOLERANCE
