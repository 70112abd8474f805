"""Packed checkpoints: written, loaded where they are mapped, damaged, and not half written."""

from __future__ import annotations

import json
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from headrace import LLM, SamplingParams
from headrace.config import EngineConfig
from headrace.errors import CheckpointError, ConfigurationError
from headrace.loading import quantize_model
from tests.support.checkpoints import (
    VOCAB,
    copy_checkpoint,
    edit_config,
    edit_tensors,
    make_checkpoint,
)
from tests.support.logits import LogitsRecorder

NAMES = ("llama3", "llama-biases", "llama3-tied", "qwen3-tied")
PROMPT = list(range(40, 75))
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Plain checkpoints by name. Not to be altered."""
    made: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in made:
            made[name] = make_checkpoint(tmp_path_factory.mktemp(name), name)
        return made[name]

    return find


@pytest.fixture(scope="module")
def whole(plain: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed checkpoint. Not to be altered."""
    return quantize(plain("llama-biases"), tmp_path_factory.mktemp("whole") / "packed")


@pytest.fixture
def packed(whole: Path, tmp_path: Path) -> Path:
    """A copy of it, to be altered."""
    return copy_checkpoint(whole, tmp_path / "packed")


def quantize(source: Path, target: Path, weights: str = "w4a8", **options: Any) -> Path:
    names = {name: options.pop(name) for name in ("head_weights",) if name in options}
    config = EngineConfig(model=str(source), weights=weights, num_threads=1, **names)
    quantize_model(config, target, **options)
    return target


def load(directory: Path, **options: Any) -> LLM:
    return LLM(str(directory), **{"dtype": "float32", "num_threads": 1, **options})


def logits_of(directory: Path, **options: Any) -> torch.Tensor:
    """``[tokens, vocab]`` of a greedy completion."""
    with load(directory, **options) as llm:
        recorder = LogitsRecorder(llm)
        return recorder.logits(llm.generate([PROMPT], GREEDY)[0])


def refusal(directory: Path, kind: type[Exception] = CheckpointError, **options: Any) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(kind) as caught:
        load(directory, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is computed -------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["bf16", "w8a8", "w4a8", "w4a8-g64-zp"])
@pytest.mark.parametrize("name", NAMES)
def test_quantizing_while_loading_is_the_same(
    name: str, format: str, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    stored = quantize(plain(name), tmp_path / "packed", format)
    found = logits_of(stored)
    assert torch.equal(found, logits_of(plain(name), weights=format))
    assert not torch.equal(found, logits_of(plain(name)))


@pytest.mark.parametrize("head", ["bf16", "w8a8", "w4a8-g128"])
def test_the_heads_format(head: str, plain: Callable[[str], Path], tmp_path: Path) -> None:
    for name in ("llama3", "llama3-tied"):
        stored = quantize(plain(name), tmp_path / name, "w8a8", head_weights=head)
        with load(stored) as llm:
            info = llm.model_info
        assert (info.weight_format, info.head_format) == ("w8a8", head)
        options = {"weights": "w8a8", "head_weights": head}
        assert torch.equal(logits_of(stored), logits_of(plain(name), **options))


@pytest.mark.parametrize("name", NAMES)
def test_results_stay_close(name: str, plain: Callable[[str], Path]) -> None:
    """The more bits, the closer; what is expected of random weights, not of trained ones."""
    plainly = logits_of(plain(name))[0]  # later tokens follow other ones

    def distance(format: str) -> float:
        return float((logits_of(plain(name), weights=format)[0] - plainly).norm() / plainly.norm())

    found = [distance(format) for format in ("bf16", "w8a8", "w4a8-g32")]
    assert 0 < found[0] < 0.02 and found[0] < found[1] < 0.06 and found[1] < found[2] < 0.5


def test_halves_are_kept_as_they_are(plain: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy_checkpoint(plain("qwen3-tied"), tmp_path / "halves")
    edit_tensors(source, lambda tensors: {n: t.bfloat16() for n, t in tensors.items()})
    edit_config(source, dtype="bfloat16")
    stored = quantize(source, tmp_path / "packed", "bf16")
    assert torch.equal(logits_of(stored), logits_of(source))


@pytest.mark.parametrize("name", NAMES)
def test_the_usual_way_to_compute(name: str, plain: Callable[[str], Path], tmp_path: Path) -> None:
    """In bfloat16, by whatever kernels there are."""
    stored = quantize(plain(name), tmp_path / "packed")
    found = logits_of(stored, dtype="bfloat16")
    assert torch.equal(found, logits_of(plain(name), dtype="bfloat16", weights="w4a8"))
    reference = logits_of(stored, reference=True, dtype="float32")
    assert (found[0] - reference[0]).norm() < 0.1 * reference[0].norm()


def test_reference_mode_is_still_batch_invariant(whole: Path) -> None:
    prompts = [PROMPT, PROMPT[:9], PROMPT[3:20]]
    with load(whole, reference=True) as llm:
        recorder = LogitsRecorder(llm)
        together = [recorder.logits(output) for output in llm.generate(prompts, GREEDY)]
    with load(whole, reference=True, max_num_batched_tokens=5) as llm:
        recorder = LogitsRecorder(llm)
        apart = [recorder.logits(llm.generate([prompt], GREEDY)[0]) for prompt in prompts]
    assert all(torch.equal(a, b) for a, b in zip(together, apart, strict=True))


# -- what is stored ---------------------------------------------------------------------------


def test_names_follow_the_model(whole: Path) -> None:
    names = {name for name in load_file(whole / "model.safetensors") if "padding" not in name}
    first = "model.layers.0."
    stacks = {
        first + "self_attn.q_proj+k_proj+v_proj",
        first + "self_attn.o_proj",
        first + "mlp.gate_proj+up_proj",
        first + "mlp.down_proj",
    }
    assert {name for name in names if name.startswith(first)} == {
        first + "input_layernorm.weight",
        first + "post_attention_layernorm.weight",
        *(f"{stack}.{part}" for stack in stacks for part in ("values", "scales", "bias")),
    }
    assert {name for name in names if not name.startswith("model.layers.")} == {
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.values",
        "lm_head.scales",
    }


def test_a_tied_embedding_is_stored_once(plain: Callable[[str], Path], tmp_path: Path) -> None:
    stored = quantize(plain("llama3-tied"), tmp_path / "packed")
    names = load_file(stored / "model.safetensors").keys()
    assert {n for n in names if "embed" in n or "head" in n} == {
        "model.embed_tokens.values",
        "model.embed_tokens.scales",
    }
    with load(stored) as llm:
        assert llm.model_info.head_bytes == -(-VOCAB // 16) * 16 * (64 + 4)


def test_everything_is_aligned(plain: Callable[[str], Path], tmp_path: Path) -> None:
    stored = quantize(plain("qwen3-tied"), tmp_path / "packed")
    content = (stored / "model.safetensors").read_bytes()
    size = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + size])
    assert (8 + size) % 4096 == 0
    offsets = {n: entry["data_offsets"] for n, entry in header.items() if n != "__metadata__"}
    assert all(start % 64 == 0 for n, (start, _) in offsets.items() if "padding" not in n)
    assert any("padding" in name for name in offsets), "the test shows too little"


def test_the_configuration_says_how(whole: Path, plain: Callable[[str], Path]) -> None:
    config, source = (
        json.loads((directory / "config.json").read_text())
        for directory in (whole, plain("llama-biases"))
    )
    assert config == {
        **source,
        "quantization_config": {
            "quant_method": "headrace",
            "layout_version": 1,
            "format": "w4a8-g32",
            "head_format": "w8a8",
        },
    }
    for file in ("tokenizer.json", "generation_config.json"):
        assert (whole / file).read_bytes() == (plain("llama-biases") / file).read_bytes()
    assert len(list(whole.iterdir())) == 4


def test_shards_are_packed_as_one_file_is(whole: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "shards", "llama-biases", max_shard_size="60KB")
    stored = quantize(source, tmp_path / "packed")
    file = "model.safetensors"
    assert (stored / file).read_bytes() == (whole / file).read_bytes()


def test_what_was_loaded_is_said(whole: Path, plain: Callable[[str], Path]) -> None:
    steps: list[tuple[int, int]] = []
    with load(whole, progress=lambda done, total: steps.append((done, total))) as llm:
        info = llm.model_info
    tensors = load_file(whole / "model.safetensors").items()
    stored = {name: t for name, t in tensors if "padding" not in name}
    widened = sum(t.nbytes for n, t in stored.items() if n.endswith((".bias", "norm.weight")))
    assert info.weight_bytes == sum(t.nbytes for t in stored.values())
    assert widened > 0 and info.head_bytes == sum(
        t.nbytes for n, t in stored.items() if n.startswith("lm_head")
    )
    assert (info.weight_format, info.head_format) == ("w4a8-g32", "w8a8")
    assert steps[-1][0] <= steps[-1][1]
    with load(plain("llama-biases")) as llm:
        assert llm.model_info.num_parameters == info.num_parameters
        assert llm.model_info.weight_format == llm.model_info.head_format == "float32"


def test_the_file_is_used_where_it_is_mapped(whole: Path) -> None:
    """Not a page of the mapping becomes memory of the process's own."""
    with load(whole) as llm:
        llm.generate([PROMPT], GREEDY)
        blocks = re.split(
            r"^(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text(), flags=re.MULTILINE
        )
        mapped = [block for block in blocks if str(whole) in block.partition("\n")[0]]
        assert mapped
        for block in mapped:
            sizes = dict(re.findall(r"^(\w+): +(\d+) kB", block, re.MULTILINE))
            assert (sizes["Private_Dirty"], sizes["Anonymous"]) == ("0", "0")


def test_mapped_weights_are_not_free_memory(
    whole: Path, plain: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system counts their pages as available."""
    free = 400_000
    monkeypatch.setattr("headrace.ops.device.available_memory", lambda: free)
    with load(plain("llama-biases"), weights="w4a8") as llm:
        owned = llm.model_info
    with load(whole) as llm:
        mapped = llm.model_info
    page = mapped.kv_token_bytes * mapped.block_size
    missing = (owned.num_pages - mapped.num_pages) * page
    assert abs(missing - mapped.weight_bytes / 2) < mapped.weight_bytes / 10


# -- what is refused --------------------------------------------------------------------------


def quantization(directory: Path, **changed: Any) -> Path:
    """Change what ``config.json`` says of the weights."""
    section = json.loads((directory / "config.json").read_text())["quantization_config"]
    return edit_config(directory, quantization_config={**section, **changed})


@pytest.mark.parametrize("version", [0, 2, None, "1"])
def test_another_version(version: Any, packed: Path) -> None:
    message = refusal(quantization(packed, layout_version=version))
    assert f"layout_version is {version!r}" in message and "headrace quantize" in message


@pytest.mark.parametrize(
    "section", [{"quant_method": "bitsandbytes", "load_in_4bit": True}, {"bits": 4}, "awq", []]
)
def test_another_method(section: Any, packed: Path) -> None:
    message = refusal(edit_config(packed, quantization_config=section))
    assert "quantization_config: quant_method" in message and "unquantized" in message


@pytest.mark.parametrize("field", ["format", "head_format"])
@pytest.mark.parametrize("name", ["w3a8", None])
def test_unknown_format(field: str, name: Any, packed: Path) -> None:
    message = refusal(quantization(packed, **{field: name}))
    assert f"quantization_config: {field}: weight format '{name}'" in message
    assert "w4a8-g64" in message


@pytest.mark.parametrize("field", ["format", "head_format"])
def test_format_that_is_not_stored(field: str, packed: Path) -> None:
    message = refusal(quantization(packed, **{field: "w4a8-g128-zp"}))
    assert re.search(r"tensor '\S+\.\w+' (has shape|is missing)", message)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj+k_proj+v_proj.values",
        "model.layers.1.mlp.gate_proj+up_proj.scales",
        "model.layers.1.self_attn.o_proj.bias",
        "model.embed_tokens.weight",
        "model.norm.weight",
        "lm_head.scales",
    ],
)
@pytest.mark.parametrize("fault", ["missing", "short", "of another type"])
def test_tensor(name: str, fault: str, packed: Path) -> None:
    def edit(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensor = tensors.pop(name)
        if fault == "missing":
            return tensors
        return {**tensors, name: tensor[:-1] if fault == "short" else tensor.to(torch.float64)}

    edit_tensors(packed, edit)
    message = refusal(packed)
    assert repr(name) in message and str(packed) in message
    wanted = {"missing": ("missing", "fetch"), "short": ("shape", "config.json asks for")}
    words = wanted.get(fault, ("stored as", "64"))
    assert all(word in message for word in words)


@pytest.mark.parametrize("kept", [0, 5, 2000, -100_000, -1])
def test_truncated_file(kept: int, packed: Path) -> None:
    file = packed / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    message = refusal(packed)
    assert str(file) in message and "truncated" in message and "fetch it again" in message


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": "w8a8"}, ["weights: ", "packed as w4a8-g32, not w8a8"]),
        ({"head_weights": "bf16"}, ["head_weights: ", "packed as w8a8, not bf16"]),
    ],
)
def test_other_formats_than_the_stored(
    options: dict[str, str], words: list[str], whole: Path
) -> None:
    message = refusal(whole, ConfigurationError, **options)
    assert all(word in message for word in words)
    assert load(whole, weights="w4a8-g32", head_weights="w8a8").model_info.num_parameters


@pytest.mark.parametrize("field", ["weights", "head_weights"])
def test_unknown_names(field: str, whole: Path) -> None:
    message = refusal(whole, ConfigurationError, **{field: "int4"})
    assert message.startswith(f"{field}: weight format 'int4' is unknown; known: bf16, ")
    message = refusal(whole, ConfigurationError, **{field: 4})
    assert message == f"{field}: must be a name, got 4"


# -- what writing leaves behind ---------------------------------------------------------------


def quantize_refusal(source: Path, target: Path, **options: Any) -> str:
    with pytest.raises((CheckpointError, ConfigurationError)) as caught:
        quantize(source, target, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_nothing_is_overwritten_unasked(whole: Path, packed: Path, tmp_path: Path) -> None:
    source = make_checkpoint(tmp_path / "other", "llama3")
    before = {file: file.read_bytes() for file in packed.iterdir()}
    assert "--force" in quantize_refusal(source, packed)
    assert {file: file.read_bytes() for file in packed.iterdir()} == before
    quantize(source, packed, "w8a8", force=True)
    assert torch.equal(logits_of(packed), logits_of(source, weights="w8a8"))


def test_what_a_killed_process_left_is_no_checkpoint(
    whole: Path, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    target = tmp_path / "packed"
    target.mkdir()
    (target / "model.safetensors.partial").write_bytes(b"some of it")
    quantize(plain("llama-biases"), target)
    assert sorted(f.name for f in target.iterdir()) == sorted(f.name for f in whole.iterdir())


def test_the_rest_of_an_overwritten_checkpoint_is_not_taken_for_weights(
    whole: Path, plain: Callable[[str], Path], tmp_path: Path
) -> None:
    target = make_checkpoint(tmp_path / "shards", "llama3", max_shard_size="60KB")
    quantize(plain("llama-biases"), target, force=True)
    assert torch.equal(logits_of(target), logits_of(whole))


def test_the_model_itself_is_no_target(packed: Path) -> None:
    edit_config(packed, removed=("quantization_config",))
    assert "the model itself" in quantize_refusal(packed, packed, force=True)


def test_a_file_is_no_target(plain: Callable[[str], Path], tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    assert "is a file" in quantize_refusal(plain("llama3"), file, force=True)
    assert file.read_text() == "text"


def test_packed_models_are_no_source(whole: Path, tmp_path: Path) -> None:
    assert "packed already" in quantize_refusal(whole, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_a_format_must_be_named(plain: Callable[[str], Path], tmp_path: Path) -> None:
    assert "weights: name a format" in quantize_refusal(
        plain("llama3"), tmp_path / "packed", weights="auto"
    )


def test_a_source_without_a_tensor(plain: Callable[[str], Path], tmp_path: Path) -> None:
    source = copy_checkpoint(plain("llama3"), tmp_path / "source")
    edit_tensors(source, lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"})
    assert "'lm_head.weight' is missing" in quantize_refusal(source, tmp_path / "packed")
    assert not (tmp_path / "packed").exists()


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """As if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [0, 2_000, 50_000])
@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_a_full_disk(
    size: int, there: bool, plain: Callable[[str], Path], packed: Path, tmp_path: Path
) -> None:
    target = packed if there else tmp_path / "new" / "packed"
    before = {file: file.read_bytes() for file in target.iterdir()} if there else {}
    with largest_file(size):
        message = quantize_refusal(plain("llama3"), target, force=there)
    assert str(target) in message and "cannot be written" in message and "make room" in message
    if there:
        assert {file: file.read_bytes() for file in target.iterdir()} == before
    else:
        assert not target.exists()


@pytest.mark.parametrize("there", [False, True], ids=["new", "replaced"])
def test_an_interrupt(
    there: bool, plain: Callable[[str], Path], packed: Path, tmp_path: Path
) -> None:
    target = packed if there else tmp_path / "new"
    before = {file: file.read_bytes() for file in target.iterdir()} if there else {}

    def interrupt(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(plain("llama3"), target, progress=interrupt, force=there)
    if there:
        assert {file: file.read_bytes() for file in target.iterdir()} == before
    else:
        assert not target.exists()


def test_a_place_that_cannot_be_made(plain: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = quantize_refusal(plain("llama3"), tmp_path / "file" / "packed")
    assert "cannot be written" in message
