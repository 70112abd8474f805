"""Checkpoints as they come, whole or damaged, through the engine's front door."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.engine.engine import Engine
from headrace.errors import CheckpointError, InvalidRequestError
from headrace.kv.arena import KVArena
from headrace.models.base import DecoderModel
from headrace.ops.device import resolve_device
from headrace.weights.safetensors_checkpoint import SafetensorsCheckpoint
from tests.support.checkpoints import (
    VOCAB,
    copy_checkpoint,
    edit_config,
    edit_tensors,
    make_checkpoint,
    write_tokenizer,
)
from tests.support.logits import LogitsRecorder

INDEX = "model.safetensors.index.json"
PROMPT = list(range(40, 75))
GREEDY = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in fp32, in one file. Not to be altered."""
    return make_checkpoint(tmp_path_factory.mktemp("whole"), "llama-biases")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in several files. Not to be altered."""
    directory = tmp_path_factory.mktemp("sharded")
    make_checkpoint(directory, "llama-biases", max_shard_size="60KB")
    assert len(list(directory.glob("model-*-of-*.safetensors"))) > 3
    return directory


@pytest.fixture
def checkpoint(whole: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint in one file, to be altered."""
    return copy_checkpoint(whole, tmp_path / "checkpoint")


@pytest.fixture
def shards(sharded: Path, tmp_path: Path) -> Path:
    """A copy of the checkpoint in several files, to be altered."""
    return copy_checkpoint(sharded, tmp_path / "checkpoint")


def load(directory: Path, **options: Any) -> LLM:
    return LLM(str(directory), num_threads=1, **options)


def logits_of(directory: Path, **options: Any) -> torch.Tensor:
    """``[tokens, vocab]`` of a greedy completion."""
    with load(directory, **options) as llm:
        recorder = LogitsRecorder(llm)
        return recorder.logits(llm.generate([PROMPT], GREEDY)[0])


def refusal(directory: Path, **options: Any) -> str:
    """The message with which a checkpoint is refused."""
    with pytest.raises(CheckpointError) as caught:
        load(directory, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# -- what is read -----------------------------------------------------------------------------


def test_shards_are_read_as_one_file_is(whole: Path, sharded: Path) -> None:
    assert torch.equal(logits_of(sharded), logits_of(whole))


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_stored_types(stored: torch.dtype, checkpoint: Path, tmp_path: Path) -> None:
    """Computed in fp32, half precision equals fp32 weights of the same values."""
    halves = edit_tensors(checkpoint, lambda t: {n: x.to(stored) for n, x in t.items()})
    rounded = copy_checkpoint(halves, tmp_path / "rounded")
    edit_tensors(rounded, lambda t: {n: x.float() for n, x in t.items()})
    assert torch.equal(logits_of(halves, dtype="float32"), logits_of(rounded, dtype="float32"))


@pytest.mark.parametrize("named", [True, False], ids=["named", "unnamed"])
@pytest.mark.parametrize("stored", ["float32", "bfloat16", "float16"])
def test_automatic_type_follows_the_checkpoint(stored: str, named: bool, checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda t: {n: x.to(getattr(torch, stored)) for n, x in t.items()})
    edit_config(checkpoint, dtype=stored if named else None)
    fast = resolve_device("cpu").fast_dtypes
    fallback = "bfloat16" if "bfloat16" in fast else "float32"
    with load(checkpoint, device="cpu") as llm:
        assert llm.model_info.dtype == (stored if stored in fast else fallback)
        assert llm.generate([PROMPT], GREEDY)[0].error is None


def test_chosen_type_wins_over_the_checkpoint(whole: Path) -> None:
    with load(whole, dtype="bfloat16") as llm:
        assert llm.model_info.dtype == "bfloat16"
        assert llm.model_info.kv_token_bytes == 2 * 2 * 2 * 16 * 2


def test_parameters_and_bytes_are_counted(whole: Path) -> None:
    tensors = load_file(whole / "model.safetensors").values()
    steps: list[tuple[int, int]] = []
    with load(whole, progress=lambda done, total: steps.append((done, total))) as llm:
        assert llm.model_info.num_parameters == sum(t.numel() for t in tensors)
        assert llm.model_info.weight_bytes == sum(t.nbytes for t in tensors)
    assert steps == sorted(steps)
    assert steps[-1][0] == sum(t.nbytes for t in tensors) <= steps[-1][1]


def test_the_files_may_go_away_after_loading(checkpoint: Path) -> None:
    before = logits_of(checkpoint)
    with load(checkpoint) as llm:
        shutil.rmtree(checkpoint)
        assert str(checkpoint) not in Path("/proc/self/maps").read_text()
        recorder = LogitsRecorder(llm)
        assert torch.equal(recorder.logits(llm.generate([PROMPT], GREEDY)[0]), before)


def test_tensors_that_the_model_lacks_are_ignored(checkpoint: Path) -> None:
    """Old Llama checkpoints hold frequencies of RoPE."""
    before = logits_of(checkpoint)
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8), "step": torch.tensor(1)}
    edit_tensors(checkpoint, lambda tensors: {**tensors, **extra})
    assert torch.equal(logits_of(checkpoint), before)


def test_a_tied_head_may_be_stored_too(tmp_path: Path) -> None:
    directory = make_checkpoint(tmp_path / "tied", "llama3-tied")
    before = logits_of(directory)
    edit_tensors(
        directory, lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )
    assert torch.equal(logits_of(directory), before)


# -- files that are missing or damaged --------------------------------------------------------


def test_missing_directory(tmp_path: Path) -> None:
    assert "nowhere" in refusal(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("name", "fix"),
    [
        ("config.json", "save_pretrained"),
        ("model.safetensors", "save_pretrained"),
        ("tokenizer.json", "copy it"),
    ],
)
def test_missing_file(name: str, fix: str, checkpoint: Path) -> None:
    (checkpoint / name).unlink()
    message = refusal(checkpoint)
    assert str(checkpoint) in message and Path(name).suffix in message and fix in message


def test_missing_shard(shards: Path) -> None:
    victim = sorted(shards.glob("model-*.safetensors"))[1]
    victim.unlink()
    message = refusal(shards)
    assert str(victim) in message and INDEX in message and "fetch it again" in message


def test_missing_index(shards: Path) -> None:
    (shards / INDEX).unlink()
    message = refusal(shards)
    assert str(shards) in message and INDEX in message and "fetch it again" in message


@pytest.mark.parametrize("name", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_only_pickled_weights(name: str, checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    (checkpoint / name).write_bytes(b"cos\nsystem\n(S'touch owned'\ntR.")
    message = refusal(checkpoint)
    assert "no *.safetensors" in message and "save_pretrained" in message


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "JSON"),
        (b'{"model_type": "llama"', "JSON"),
        (b"\xff\xfe\x00", "JSON"),
        (b"[1, 2]", "object"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "generation_config.json", INDEX])
def test_corrupt_json(name: str, content: bytes, fault: str, checkpoint: Path) -> None:
    (checkpoint / name).write_bytes(content)
    message = refusal(checkpoint)
    assert str(checkpoint / name) in message and fault in message and "fetch it again" in message


@pytest.mark.parametrize(
    "weight_map", [None, [], "model.safetensors", {"a": 1, "b": "c"}, {"a": ["model.safetensors"]}]
)
def test_index_of_the_wrong_form(weight_map: Any, shards: Path) -> None:
    (shards / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    message = refusal(shards)
    assert str(shards / INDEX) in message and "weight_map" in message


def test_index_that_promises_a_tensor_too_many(shards: Path) -> None:
    """The shard it names is there, but lacks the tensor."""
    victim = "model.layers.1.mlp.up_proj.weight"
    index = json.loads((shards / INDEX).read_text())
    shard = index["weight_map"][victim]
    tensors = load_file(shards / shard)
    del tensors[victim]
    save_file(tensors, shards / shard)
    assert victim in refusal(shards)


def header_bytes(file: Path) -> int:
    """Where the tensors begin in a file of safetensors."""
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


CUTS: dict[str, Callable[[int, int], int]] = {
    "empty": lambda header, size: 0,
    "in the length of the header": lambda header, size: 5,
    "after the length of the header": lambda header, size: 8,
    "in the header": lambda header, size: header // 2,
    "at the end of the header": lambda header, size: header,
    "in the first tensor": lambda header, size: header + 3,
    "in the middle": lambda header, size: size // 2,
    "one byte": lambda header, size: size - 1,
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
@pytest.mark.parametrize("kind", ["checkpoint", "shards"])
def test_truncated_file(
    cut: Callable[[int, int], int], kind: str, request: pytest.FixtureRequest
) -> None:
    directory: Path = request.getfixturevalue(kind)
    file = max(directory.glob("*.safetensors"))
    content = file.read_bytes()
    file.write_bytes(content[: cut(header_bytes(file), len(content))])
    message = refusal(directory)
    assert str(file) in message and "truncated" in message and "fetch it again" in message


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:8] + b"\x00" * 40 + content[48:], id="zeros"),
        pytest.param(lambda content: b"\xff" * 8 + content[8:], id="length of the header"),
        pytest.param(lambda content: content.replace(b'"F32"', b'"Z99"', 1), id="unknown type"),
        pytest.param(lambda content: content + b"\x00" * 8, id="bytes too many"),
        pytest.param(lambda content: b"<!DOCTYPE html><html>login</html>", id="a web page"),
        pytest.param(
            lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            id="a pointer of git-lfs",
        ),
    ],
)
def test_corrupt_file(damage: Callable[[bytes], bytes], checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    message = refusal(checkpoint)
    assert str(file) in message and "damaged" in message and "fetch it again" in message


# -- tensors that do not fit ------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.0.input_layernorm.weight",
        "model.layers.0.self_attn.k_proj.weight",
        "model.layers.1.self_attn.o_proj.bias",
        "model.layers.1.mlp.down_proj.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
@pytest.mark.parametrize("fault", ["missing", "transposed or short", "of another type"])
def test_tensor(name: str, fault: str, checkpoint: Path) -> None:
    def edit(tensors: Tensors) -> Tensors:
        tensor = tensors.pop(name)
        if fault == "missing":
            return tensors
        if fault == "of another type":
            return {**tensors, name: tensor.to(torch.float64)}
        shorter = tensor.narrow(0, 0, len(tensor) - 1)
        return {**tensors, name: tensor.T if _is_oblong(tensor) else shorter}

    edit_tensors(checkpoint, edit)
    message = refusal(checkpoint)
    assert repr(name) in message and str(checkpoint) in message
    wanted = {
        "missing": ("missing", "fetch"),
        "transposed or short": ("shape", "config.json asks for"),
        "of another type": ("F64", "convert"),
    }
    assert all(word in message for word in wanted[fault])


def _is_oblong(tensor: torch.Tensor) -> bool:
    return tensor.ndim == 2 and tensor.shape[0] != tensor.shape[1]


def test_a_head_that_is_missing_is_not_taken_for_a_tied_one(checkpoint: Path) -> None:
    edit_tensors(checkpoint, lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"})
    edit_config(checkpoint, removed=("tie_word_embeddings",))
    assert "'lm_head.weight'" in refusal(checkpoint)


# -- configurations that cannot be run --------------------------------------------------------


@pytest.mark.parametrize("model_type", ["mpt", "base", "layers", "../llama", None, ["llama"]])
def test_unknown_architecture_lists_the_known(model_type: Any, checkpoint: Path) -> None:
    edit_config(checkpoint, model_type=model_type)
    message = refusal(checkpoint)
    assert repr(model_type) in message and "config.json" in message
    assert "known: bert, deepseek_v2," in message and " llama, mamba2, " in message


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"hidden_act": "selu"}, ["activation", "'selu'", "silu, swish, gelu"]),
        ({"hidden_act": ["silu"]}, ["activation", "['silu']"]),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, ["original_max_position"]),
        ({"rope_parameters": {"rope_type": "dynamic"}}, ["'dynamic'", "linear, llama3, yarn"]),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, ["'dynamic'", "linear, llama3"]),
        ({"rope_parameters": {"rope_type": "linear"}}, ["factor"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, ["factor", "got 0"]),
        ({"rope_parameters": {"rope_type": "linear", "factor": "4"}}, ["factor", "'4'"]),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["original_max_position"]),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e6}}}, ["full_attention"]),
        ({"rope_scaling": [1]}, ["[1]"]),
        ({"rope_parameters": None, "rope_theta": "x"}, ["rope_theta", "'x'"]),
        ({"partial_rotary_factor": 0.5}, ["partial_rotary_factor", "0.5"]),
        ({"head_dim": 15}, ["head_dim", "15"]),
        ({"hidden_size": None}, ["hidden_size"]),
        ({"num_attention_heads": 0}, ["num_attention_heads", "got 0"]),
        ({"num_hidden_layers": -1}, ["num_hidden_layers", "got -1"]),
        ({"num_key_value_heads": 3}, ["num_key_value_heads", "3", "divide"]),
        ({"vocab_size": "300"}, ["vocab_size", "'300'"]),
        ({"intermediate_size": 1.5}, ["intermediate_size", "1.5"]),
        ({"rms_norm_eps": "small"}, ["rms_norm_eps", "'small'"]),
        ({"max_position_embeddings": True}, ["max_position_embeddings", "True"]),
    ],
)
def test_configuration(changed: dict[str, Any], words: list[str], checkpoint: Path) -> None:
    edit_config(checkpoint, **changed)
    message = refusal(checkpoint)
    assert all(word in message for word in ["config.json", *words]), message


@pytest.mark.parametrize(
    "name", ["hidden_size", "num_attention_heads", "num_hidden_layers", "vocab_size"]
)
def test_configuration_that_lacks_a_size(name: str, checkpoint: Path) -> None:
    edit_config(checkpoint, removed=(name,))
    assert f"config.json lacks {name!r}" in refusal(checkpoint)


def test_corrupt_tokenizer(checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text('{"version": "1.0"')
    assert str(checkpoint / "tokenizer.json") in refusal(checkpoint)


def test_tokens_that_the_model_lacks_are_refused_where_they_are_used(checkpoint: Path) -> None:
    """Some tokenizers name tokens, such as one for padding, that the embedding has no row for."""
    write_tokenizer(checkpoint, extra_tokens=VOCAB)
    with load(checkpoint) as llm:
        assert llm.tokenizer.vocab_size > VOCAB
        assert llm.generate("a headrace", GREEDY)[0].error is None
        with pytest.raises(InvalidRequestError, match=str(VOCAB)):
            llm.generate(f"<|extra {VOCAB - 1}|>", GREEDY)


# -- what a refusal leaves behind -------------------------------------------------------------


@pytest.fixture
def spoilt(checkpoint: Path) -> Path:
    """The last tensor that is read is missing: everything else has been loaded by then."""
    edit_tensors(checkpoint, lambda t: {n: x for n, x in t.items() if n != "lm_head.weight"})
    return checkpoint


def test_a_refusal_leaves_no_engine(spoilt: Path) -> None:
    def left() -> int:
        kinds = (Engine, KVArena, DecoderModel, SafetensorsCheckpoint)
        gc.collect()
        return sum(issubclass(type(thing), kinds) for thing in gc.get_objects())

    before = left()
    refusal(spoilt)
    assert left() == before
    assert str(spoilt) not in Path("/proc/self/maps").read_text()


def test_a_refusal_starts_no_thread(spoilt: Path) -> None:
    before = set(threading.enumerate())
    with pytest.raises(CheckpointError, match=r"lm_head\.weight"):
        AsyncLLM(str(spoilt), num_threads=1)
    assert set(threading.enumerate()) == before


def test_a_refusal_is_the_same_twice_and_a_repair_helps(spoilt: Path, whole: Path) -> None:
    assert refusal(spoilt) == refusal(spoilt)
    shutil.copy(whole / "model.safetensors", spoilt)
    assert torch.equal(logits_of(spoilt), logits_of(whole))
