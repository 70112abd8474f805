"""``headrace doctor``: facts and advice."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from torch import Tensor

from headrace import LLM
from headrace.cli.doctor import (
    Machine,
    ModelEstimate,
    estimate,
    machine_advice,
    model_advice,
)
from headrace.config import EngineConfig
from headrace.loading import embedded_model
from headrace.ops import host
from headrace.ops.device import resolve_device
from headrace.plan.hardware import HardwareProfile, read_bandwidth
from tests.cli.programs import invoke
from tests.support.checkpoints import write_tokenizer
from tests.support.gguf_files import RawTensor, convert, encoded
from tests.support.gguf_models import CONFIGS, make_model

GOOD = Machine(
    headrace="0",
    python="3",
    torch="2",
    hardware=HardwareProfile("CPU", 8, ("avx512_bf16", "amx_bf16"), 1 << 34, 1 << 25, 50e9),
    machine_cores=8,
    device="cpu",
    device_memory=1 << 34,
    threads=8,
    kernels=("portable", "avx2"),
)
NO_HALVES = replace(GOOD, hardware=replace(GOOD.hardware, isa=("avx2",)), kernels=("portable",))
FITTING = ModelEstimate(
    name="m",
    architecture="llama",
    num_parameters=10,
    weight_format="bfloat16",
    head_format="bfloat16",
    stored_dtype="bfloat16",
    dtype="bfloat16",
    isa="avx2",
    kept=(),
    weight_bytes=20,
    kv_token_bytes=4,
    context=4096,
    cached_tokens=10**6,
    max_model_len=4096,
    problem=None,
)


def test_what_stored_integers_are_kept_as(tmp_path: Path) -> None:
    """Layers in one type, the head in another, and rows that no block divides in none."""

    def encode(name: str, tensor: Tensor) -> RawTensor:
        kind = "Q8_0" if name == "output.weight" else "Q4_0"
        return encoded(name, tensor, kind if tensor.ndim > 1 and tensor.shape[1] == 64 else "F32")

    make_model(CONFIGS["llama"]()).save_pretrained(tmp_path)
    write_tokenizer(tmp_path / "tokenizer")
    path = convert(tmp_path, tmp_path / "model.gguf", encode)
    kept = {}
    for dtype in ("bfloat16", "float32"):
        model = estimate(EngineConfig(str(path), dtype=dtype), resolve_device("cpu"))
        kept[model.dtype] = {stored: kept for stored, kept, _ in model.kept}
        assert sum(share for _, _, share in model.kept) == pytest.approx(1, abs=1e-3)
        tokenizer = str(tmp_path / "tokenizer")
        with LLM(str(path), dtype=dtype, tokenizer=tokenizer, kv_cache_memory_bytes=1 << 20) as llm:
            info = llm.model_info
            # What fills the last panel or the last columns is not counted.
            assert model.weight_bytes == pytest.approx(info.weight_bytes, rel=0.06)
        stored = model.weight_format == "as stored"
        assert stored == (dtype == "bfloat16") == (info.weight_format != model.dtype)
    assert kept["bfloat16"] == {
        "Q4_0": "blocks of 4 bits in groups of 32",
        "Q8_0": "blocks of 8 bits in groups of 32",
        "F32": "bfloat16",
    }
    assert kept["float32"] == {"Q4_0": "float32", "Q8_0": "float32", "F32": "float32"}


def test_json_agrees_with_the_loaded_model() -> None:
    done = invoke("doctor", "--json", "--kv-cache-memory", "1MiB")
    assert done.exit_code == 0, done.output
    result = json.loads(done.stdout)
    machine, model = result["machine"], result["model"]
    assert machine["hardware"]["cores"] == host.usable_cores()
    assert machine["hardware"]["memory_bandwidth"] > 1e8
    assert machine["kernels"][0] == "portable" and "amx_emulated" not in machine["kernels"]
    with LLM(kv_cache_memory_bytes=1 << 20) as llm:
        info = llm.model_info
    names = ("name", "architecture", "num_parameters", "dtype", "kv_token_bytes", "max_model_len")
    assert {name: model[name] for name in names} == {name: getattr(info, name) for name in names}
    assert model["cached_tokens"] == info.num_pages * info.block_size
    assert model["weight_bytes"] <= info.weight_bytes
    assert any("context is cut from 2,048" in line for line in result["advice"])


@pytest.mark.parametrize("name", ["w8a8", "w4a8-g64-zp"])
def test_formats_are_counted(name: str, tmp_path: Path) -> None:
    """Of weights quantized while loading, and of a packed checkpoint, as they will be in memory."""
    packed = str(tmp_path / "packed")
    assert invoke("quantize", str(embedded_model()), "--format", name, "-o", packed).exit_code == 0
    with LLM(packed, kv_cache_memory_bytes=1 << 20) as llm:
        info = llm.model_info
    for arguments in ((packed,), ("--weights", name)):
        done = invoke("doctor", *arguments, "--json", "--kv-cache-memory", "1MiB")
        model = json.loads(done.stdout)["model"]
        names = ("num_parameters", "weight_bytes", "weight_format", "head_format")
        assert {n: model[n] for n in names} == {n: getattr(info, n) for n in names}


def test_the_instruction_set_is_the_one_that_would_compute() -> None:
    done = invoke("doctor", "--isa", "avx2", "--dtype", "bfloat16", "--json")
    assert json.loads(done.stdout)["model"]["isa"] == "avx2"
    refused = invoke("doctor", "--isa", "sse9", "--dtype", "bfloat16")
    assert refused.exit_code == 1 and "sse9 is unknown" in refused.stderr


def test_tables() -> None:
    done = invoke("doctor")
    assert done.exit_code == 0, done.output
    for text in ("memory bandwidth", "GB/s", "model headrace-embedded", "KV cache per token"):
        assert text in done.stdout


def test_a_model_that_cannot_start() -> None:
    done = invoke("doctor", "--json", "--kv-cache-memory", "1KiB")
    assert done.exit_code == 1
    result = json.loads(done.stdout)
    assert result["model"]["max_model_len"] == 0
    assert "kv_cache_memory_bytes" in result["model"]["problem"]


def test_a_model_that_is_not_there(tmp_path: Path) -> None:
    done = invoke("doctor", str(tmp_path / "none"))
    assert (done.exit_code, done.stdout) == (1, "")
    assert str(tmp_path / "none") in done.stderr


@pytest.fixture(autouse=True)
def no_gpu_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "has_gpu_driver", lambda: False)


def test_nothing_to_say_about_a_good_machine() -> None:
    assert list(machine_advice(GOOD)) == []
    assert list(model_advice(FITTING)) == []


@pytest.mark.parametrize(
    ("machine", "advice"),
    [
        (replace(GOOD, machine_cores=16), "Only 8 of the machine's 16 cores"),
        (replace(GOOD, threads=9), "use --threads 8"),
        (replace(GOOD, hardware=replace(GOOD.hardware, memory_bandwidth=5e9)), "only 5.0 GB/s"),
        (NO_HALVES, "no bfloat16"),
        (replace(GOOD, kernels=()), "not built"),
        (replace(GOOD, hardware=replace(GOOD.hardware, isa=("avx512_bf16",))), "no AMX"),
    ],
)
def test_advice_on_the_machine(machine: Machine, advice: str) -> None:
    (line,) = machine_advice(machine)
    assert advice in line


def test_advice_on_a_gpu_that_torch_does_not_see(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "has_gpu_driver", lambda: True)
    (line,) = machine_advice(GOOD)
    assert "GPU build" in line


@pytest.mark.parametrize(
    ("model", "advice"),
    [
        (replace(FITTING, max_model_len=1024), "cut from 4,096 to 1,024"),
        (replace(FITTING, max_model_len=0, problem="no room"), "cannot start: no room."),
    ],
)
def test_advice_on_the_model(model: ModelEstimate, advice: str) -> None:
    (line,) = model_advice(model)
    assert advice in line


def test_bandwidth_is_measured_over_the_whole_buffer(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 0.0, 2.0, 10.0, 10.5, 20.0])
    monkeypatch.setattr("headrace.plan.hardware.time.perf_counter", lambda: next(ticks))
    assert read_bandwidth(cores=3, size=1 << 20, seconds=15.0) == (1 << 20) / 0.5
