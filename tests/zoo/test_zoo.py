"""The recipe of the embedded model: its tokenizer, text, order of training, resuming and export."""

from __future__ import annotations

import ast
import json
import math
import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jinja2.sandbox import ImmutableSandboxedEnvironment
from numpy.typing import NDArray
from tokenizers import Tokenizer
from torch.nn import functional

from headrace.evaluation.held_out import HELD_OUT_MODULES
from zoo import corpus
from zoo.chat import chat_documents, module_exchanges, turn
from zoo.data import Phase, SpecialIds, TrainingData, fill_in_the_middle
from zoo.evaluate import token_bits
from zoo.export import export_model, load_model
from zoo.model import LanguageModel, ModelConfig, chunked_cross_entropy, initialize
from zoo.tokenizer import SPECIAL_TOKENS, load_tokenizer
from zoo.train import TrainConfig, Trainer, atomic_save, learning_rate_scale

EXPORT = Path(__file__).parents[2] / "src" / "headrace" / "assets" / "embedded"
TINY = ModelConfig(
    vocab_size=128,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    intermediate_size=24,
    max_position_embeddings=32,
)
SPECIAL = SpecialIds(end_of_text=0, prefix=1, middle=2, suffix=3)
MAXIMUM_PARAMETERS = 3_700_000
MAXIMUM_BYTES = 8_000_000


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    """The tokenizer of the family."""
    return load_tokenizer(EXPORT / "tokenizer.json")


def tiny_data(seed: int = 0, token_budget: int = 640) -> TrainingData:
    """Ten steps of 64 tokens over random documents, in two phases."""
    generator = np.random.default_rng(1)
    documents = [generator.integers(4, 128, 90).astype(np.uint16) for _ in range(6)]
    phases = (Phase(0.5, 16), Phase(0.5, 32))
    return TrainingData(documents, documents[:1], SPECIAL, phases, token_budget, 64, seed)


def tiny_trainer(directory: Path, **settings: int) -> Trainer:
    """A run of ten steps that keeps its checkpoint in ``directory``."""
    config = TrainConfig(token_budget=640, tokens_per_step=64, warmup_steps=2, **settings)
    return Trainer(TINY, config, tiny_data(), directory, torch.device("cpu"))


# The tokenizer


def test_the_vocabulary_is_complete(tokenizer: Tokenizer) -> None:
    assert tokenizer.get_vocab_size() == 4096
    assert [tokenizer.id_to_token(index) for index in range(64)] == list(SPECIAL_TOKENS)
    assert len(set(SPECIAL_TOKENS)) == 64
    assert all(tokenizer.encode(token).ids == [i] for i, token in enumerate(SPECIAL_TOKENS))


def test_digits_stand_alone(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("x = 10203").tokens[-5:] == ["1", "0", "2", "0", "3"]
    longer = [t for t in tokenizer.get_vocab() if len(t) > 1 and any(c in "0123456789" for c in t)]
    assert all(token in SPECIAL_TOKENS for token in longer)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " leading and trailing ",
        "def f():\r\n\treturn 'é'\r\n",
        "\n\n        if x:\n\n\n",
        "👩‍👩‍👧 東京 ﬁ Å Å",
        "\x00\x7f\u2028\ufeff",
    ],
)
def test_round_trip_of(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_round_trip(tokenizer: Tokenizer, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_indentation_is_short(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("\n            return self").tokens[-3:] == [
        "Ġ" * 12,
        "return",
        "Ġself",
    ]


def test_nothing_is_put_in_front(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("self").tokens == ["self"]


@pytest.fixture
def render() -> Callable[..., str]:
    config = json.loads((EXPORT / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert config["eos_token"] == "<|endoftext|>"
    assert config["pad_token"] == "<|pad|>"
    assert config["bos_token"] is None
    return ImmutableSandboxedEnvironment().from_string(config["chat_template"]).render


def test_chat_template_gives_the_trained_format(render: Callable[..., str]) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "1 < 2?\n"}]},
        {"role": "assistant", "content": "Yes."},
    ]
    expected = turn("system", "Be brief.") + turn("user", "1 < 2?\n") + turn("assistant", "Yes.")
    assert render(messages=messages) == expected
    prompt = render(messages=messages[1:2], add_generation_prompt=True)
    assert prompt == turn("user", "1 < 2?\n") + "<|assistant|>\n"


def test_chat_template_renders_tools(render: Callable[..., str]) -> None:
    function = {"name": "add", "arguments": '{"a": "<1>"}'}
    messages = [
        {"role": "user", "content": "Add."},
        {"role": "assistant", "content": None, "tool_calls": [{"function": function}]},
        {"role": "tool", "content": "2"},
    ]
    call = '<tool_call>\n{"name": "add", "arguments": {"a": "<1>"}}\n</tool_call>'
    expected = turn("system", '# Tools\n{"name": "add"}') + turn("user", "Add.")
    expected += turn("assistant", call)
    expected += turn("tool", "<tool_response>\n2\n</tool_response>")
    assert render(messages=messages, tools=[{"name": "add"}]) == expected


# The text


def test_the_splits_are_disjoint() -> None:
    files = corpus.read_manifest()
    assert len({file.path for file in files}) == len(files)
    assert all(file.split == corpus.split_of(file.path) for file in files)
    sizes = {
        split: sum(f.bytes for f in files if f.split == split) for split in ("train", "heldout")
    }
    assert 0.03 < sizes["heldout"] / sum(sizes.values()) < 0.045
    held_out = {f.path.partition("/")[0].removesuffix(".py") for f in files if f.split == "heldout"}
    assert held_out == set(HELD_OUT_MODULES)


def test_tests_and_tables_are_left_out() -> None:
    paths = [file.path for file in corpus.read_manifest()]
    assert not [p for p in paths if corpus.EXCLUDED_DIRECTORIES.intersection(p.split("/")[:-1])]
    assert "encodings/cp1252.py" not in paths
    assert "pydoc_data/topics.py" in paths


def make_library(root: Path) -> None:
    """A library of two modules, one of them held out, and files that do not belong."""
    (root / "test").mkdir(parents=True)
    for path in ("heapq.py", "site.py", "test/test_site.py", "_sysconfigdata_x.py"):
        (root / path).write_text('def join(a):\n    """Join the parts of a path together."""\n')
    (root / "latin.py").write_bytes(b"# \xe9")


def test_differences_from_the_manifest_are_named(tmp_path: Path) -> None:
    make_library(tmp_path)
    before = corpus.scan_library(tmp_path)
    assert [(file.path, file.split) for file in before] == [
        ("heapq.py", "heldout"),
        ("site.py", "train"),
    ]
    corpus.write_manifest(before, tmp_path / "manifest.json")
    assert corpus.read_manifest(tmp_path / "manifest.json") == before
    (tmp_path / "site.py").write_text("changed")
    (tmp_path / "heapq.py").unlink()
    (tmp_path / "new.py").write_text("new")
    assert corpus.differences(before, corpus.scan_library(tmp_path)) == [
        "missing: heapq.py",
        "not in the manifest: new.py",
        "changed: site.py",
    ]


def test_conversations_come_from_the_training_split_alone(tmp_path: Path) -> None:
    make_library(tmp_path)
    documents = chat_documents(corpus.scan_library(tmp_path), tmp_path, seed=0)
    questions = "".join(documents)
    assert "What does site.join do?" in questions
    assert "heapq" not in questions
    assert all(document.endswith("<|end|>\n") for document in documents)


def test_exchanges_of_a_function() -> None:
    source = (
        'async def add(a, b=1) -> int:\n    """Add two numbers\n    of any kind."""\n    return a'
    )
    code = "async def add(a, b=1) -> int:\n    return a"
    exchanges = module_exchanges(ast.parse(source), "sums")
    assert [(exchange.question, exchange.answer) for exchange in exchanges] == [
        ("What does sums.add do?", "Add two numbers of any kind."),
        ("Show the signature of sums.add.", "```python\nasync def add(a, b=1) -> int:\n```"),
        (
            f"Write a docstring for this function:\n```python\n{code}\n```",
            '"""Add two numbers of any kind."""',
        ),
    ]


# The order of training


def test_batches_are_a_function_of_the_seed_and_the_step() -> None:
    first, second = tiny_data(), tiny_data()
    for step in (9, 0, 5):
        np.testing.assert_array_equal(first.batch(step), second.batch(step))
    assert not np.array_equal(first.batch(0), tiny_data(seed=1).batch(0))
    assert first.digest() == second.digest() != tiny_data(seed=1).digest()


def test_batches_are_shifted_by_one_and_follow_the_phases() -> None:
    data = tiny_data()
    shapes = [data.batch(step)[0].shape for step in range(data.steps)]
    assert shapes == [(4, 16)] * 5 + [(2, 32)] * 5
    inputs, targets = data.batch(0)
    np.testing.assert_array_equal(inputs[:, 1:], targets[:, :-1])
    with pytest.raises(IndexError):
        data.batch(data.steps)


def test_filling_in_keeps_every_token() -> None:
    document = np.arange(4, 100, dtype=np.uint16)
    result = fill_in_the_middle(document, 40, SPECIAL, np.random.default_rng(0)).tolist()
    restored: list[int] = []
    while result:
        end = result.index(SPECIAL.end_of_text)
        piece, result = result[:end], result[end + 1 :]
        suffix, middle = piece.index(SPECIAL.suffix), piece.index(SPECIAL.middle)
        assert piece[0] == SPECIAL.prefix
        restored += piece[1:suffix] + piece[middle + 1 :] + piece[suffix + 1 : middle]
    assert restored == document.tolist()


# The model and its training


def test_chunked_loss_is_the_cross_entropy() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(1500, 8, generator=generator, requires_grad=True)
    weight = torch.randn(32, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, 32, (1500,), generator=generator)
    expected = functional.cross_entropy(hidden @ weight.T, targets)
    gradients = torch.autograd.grad(expected, (hidden, weight))
    loss = chunked_cross_entropy(hidden, weight, targets)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(torch.autograd.grad(loss, (hidden, weight)), gradients)


def test_the_rate_warms_up_and_decays_to_zero() -> None:
    decay = ((0.0, 1.0), (0.5, 0.6), (1.0, 0.0))
    config = TrainConfig(token_budget=0, warmup_steps=10, decay=decay)
    scales = [learning_rate_scale(step, 100, config) for step in range(100)]
    assert scales[0] == pytest.approx(0.1)
    assert max(scales) == scales[9]
    assert scales[9:] == sorted(scales[9:], reverse=True)
    assert scales[50] == pytest.approx(0.6)
    assert scales[-1] == pytest.approx(0.6 / 50)


def test_a_resumed_run_is_the_same_run(tmp_path: Path) -> None:
    straight = tiny_trainer(tmp_path / "straight")
    losses = straight.run()
    resumed = tiny_trainer(tmp_path / "resumed").run(stop_at=5)
    last = tiny_trainer(tmp_path / "resumed")
    resumed += last.run()
    assert len(losses) == 10
    assert losses == resumed
    assert straight.is_finished
    assert all(
        torch.equal(a, b)
        for a, b in zip(straight.model.parameters(), last.model.parameters(), strict=True)
    )


class SignallingData(TrainingData):
    """Asks the process to stop when the third batch is read."""

    def batch(self, step: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the batch, after the signal if it is the third."""
        if step == 2:
            signal.raise_signal(signal.SIGTERM)
        return super().batch(step)


def test_a_signal_stops_behind_a_checkpoint(tmp_path: Path) -> None:
    trainer = tiny_trainer(tmp_path)
    trainer.data.__class__ = SignallingData
    before = signal.getsignal(signal.SIGTERM)
    assert len(trainer.run()) == 3
    assert signal.getsignal(signal.SIGTERM) is before
    assert not trainer.is_finished
    assert tiny_trainer(tmp_path).step == 3
    assert {file.name for file in tmp_path.iterdir()} == {"checkpoint.pt", "loss.jsonl"}


def test_a_checkpoint_of_other_settings_is_refused(tmp_path: Path) -> None:
    tiny_trainer(tmp_path).run(stop_at=1)
    with pytest.raises(ValueError, match="other settings"):
        tiny_trainer(tmp_path, seed=1)


def test_a_broken_write_keeps_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    atomic_save({"step": 1}, path)
    with pytest.raises(Exception, match="pickle"):
        atomic_save({"step": 2, "unwritable": lambda: None}, path)
    assert torch.load(path) == {"step": 1}


def test_windows_score_every_token_once() -> None:
    model = LanguageModel(TINY)
    initialize(model, 0)
    tokens = torch.randint(0, 128, (40,), generator=torch.Generator().manual_seed(0))
    whole = functional.cross_entropy(model(tokens[None, :-1])[0], tokens[1:], reduction="none")
    bits = token_bits(model, tokens, 39)
    torch.testing.assert_close(bits, whole.detach() / math.log(2))
    assert len(token_bits(model, tokens, 8)) == 39
    torch.testing.assert_close(token_bits(model, tokens, 8)[:8], bits[:8])


# The export


def test_the_export_is_loaded_as_it_was_written(tokenizer: Tokenizer, tmp_path: Path) -> None:
    model = LanguageModel(TINY).bfloat16()
    initialize(model, 0)
    export_model(model, tokenizer, tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config == TINY
    assert all(
        torch.equal(a.float(), b)
        for a, b in zip(model.parameters(), loaded.parameters(), strict=True)
    )


def test_the_embedded_model_is_small() -> None:
    model = load_model(EXPORT)
    assert model.config == ModelConfig()
    assert model.parameter_count() <= MAXIMUM_PARAMETERS
    assert sum(file.stat().st_size for file in EXPORT.iterdir()) <= MAXIMUM_BYTES


def test_the_embedded_model_has_learnt_python(tokenizer: Tokenizer) -> None:
    model = load_model(EXPORT)
    text = (
        "import os\n\n\ndef read(path):\n    with open(path) as file:\n        return file.read()\n"
    )
    tokens = torch.tensor([0, *tokenizer.encode(text).ids])
    assert token_bits(model, tokens, 128).sum() < 3 * len(text)


def test_transformers_computes_the_same(tokenizer: Tokenizer) -> None:
    transformers = pytest.importorskip("transformers")
    model = load_model(EXPORT)
    other = transformers.AutoModelForCausalLM.from_pretrained(EXPORT, dtype=torch.float32)
    text = "class Queue:\n    def __init__(self, maxsize=0):\n"
    ids = transformers.AutoTokenizer.from_pretrained(EXPORT)(text).input_ids
    assert ids == tokenizer.encode(text).ids
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        torch.testing.assert_close(model(tokens), other(tokens).logits, rtol=1e-4, atol=1e-4)
