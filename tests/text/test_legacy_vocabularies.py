"""Byte-level BPE and WordPiece from the files that were usual before ``tokenizer.json``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers, trainers
from transformers import BertTokenizer, GPT2Tokenizer, Qwen2Tokenizer, RobertaTokenizer

from headrace.contracts.sampling import SamplingParams
from headrace.errors import CheckpointError
from headrace.text.tokenizer import Tokenizer
from tests.text import vocabulary_files as files
from tests.text.builders import TEXT

NUMBERS, WORDS = files.NUMBERS, files.WORDS
ROBERTA = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


def byte_level() -> tokenizers.Tokenizer:
    """Byte-level BPE with tokens of digits and signs too, and special ones of several families."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|endoftext|>", "<|im_end|>", *ROBERTA],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, NUMBERS] * 4, trainer)
    return tokenizer


BYTE_LEVEL = byte_level()
texts = st.text(max_size=60) | st.text(sorted({*TEXT, *NUMBERS}), max_size=120)
parts = st.lists(st.sampled_from([*TEXT.split(), *NUMBERS.split(), " ", "  ", "\n"]), max_size=12)
prompts = texts | parts.map(" ".join) | parts.map("".join)

QWEN2 = {
    "tokenizer_class": "Qwen2Tokenizer",
    "added_tokens_decoder": {
        "0": {"content": "<|endoftext|>", "special": True},
        "1": {"content": "<|im_end|>", "special": True},
        "450": {"content": "<tool_call>", "special": False},
    },
    "eos_token": "<|im_end|>",
}
CLASSES = {
    "gpt2": (GPT2Tokenizer, {"tokenizer_class": "GPT2Tokenizer"}),
    "begins": (GPT2Tokenizer, {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True}),
    "spaced": (GPT2Tokenizer, {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True}),
    "qwen2": (Qwen2Tokenizer, {k: v for k, v in QWEN2.items() if k != "added_tokens_decoder"}),
    "roberta": (RobertaTokenizer, {"tokenizer_class": "RobertaTokenizer"}),
    "uncased": (BertTokenizer, {"tokenizer_class": "BertTokenizer"}),
    "cased": (BertTokenizer, {"tokenizer_class": "BertTokenizer", "do_lower_case": False}),
    "accents": (
        BertTokenizer,
        {
            "tokenizer_class": "BertTokenizerFast",
            "strip_accents": False,
            "tokenize_chinese_chars": False,
        },
    ),
}


def write(directory: Path, name: str) -> Path:
    directory.mkdir(exist_ok=True)
    kind, settings = CLASSES[name]
    if kind is BertTokenizer:
        return files.write_words(directory, WORDS, settings)
    return files.write_merges(directory, BYTE_LEVEL, settings)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Any]]:
    """For each kind our tokenizer and that of transformers."""
    root = tmp_path_factory.mktemp("legacy")
    return {
        name: (Tokenizer(write(root / name, name)), kind.from_pretrained(root / name))
        for name, (kind, _) in CLASSES.items()
    }


@pytest.mark.parametrize("name", sorted(CLASSES))
@given(text=prompts, special=st.booleans())
def test_encodes_and_decodes_as_transformers(
    pairs: dict[str, tuple[Tokenizer, Any]], name: str, text: str, special: bool
) -> None:
    ours, theirs = pairs[name]
    ids = ours.encode(text, special)
    assert ids == theirs.encode(text, add_special_tokens=special)
    for skip in (True, False):
        assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)


@pytest.mark.parametrize("name", sorted(CLASSES))
@given(data=st.data(), skip=st.booleans())
def test_a_stream_equals_decoding(
    pairs: dict[str, tuple[Tokenizer, Any]], name: str, data: st.DataObject, skip: bool
) -> None:
    tokenizer = pairs[name][0]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 3), max_size=30))
    stream = tokenizer.stream(SamplingParams(skip_special_tokens=skip))
    assert stream is not None
    released = [stream.push(index) for index in ids] + [stream.finish()]
    assert "".join(released) == tokenizer.decode(ids, skip)


def test_the_kinds_differ(pairs: dict[str, tuple[Tokenizer, Any]]) -> None:
    encoded = {name: ours.encode("e\u0301té 2024 don'T  水渠") for name, (ours, _) in pairs.items()}
    assert len({tuple(ids) for ids in encoded.values()}) == len(CLASSES)
    assert [WORDS[encoded["uncased"][i]] for i in (0, -1)] == ["[CLS]", "[SEP]"]


def test_added_tokens_of_qwen2(tmp_path: Path) -> None:
    tokenizer = Tokenizer(files.write_merges(tmp_path, BYTE_LEVEL, QWEN2))
    assert tokenizer.encode("<tool_call><|im_end|>") == [450, 1]
    assert tokenizer.special_token_ids == {0, 1} and tokenizer.eos_token_id == 1
    assert tokenizer.bos_token_id is None and tokenizer.vocab_size == 451
    assert tokenizer.decode([450, 1]) == "<tool_call>"


def test_files_alone_are_gpt2s_and_berts(tmp_path: Path) -> None:
    tokenizer = Tokenizer(files.write_merges(tmp_path, BYTE_LEVEL))
    assert tokenizer.eos_token_id == tokenizer.bos_token_id == 0
    assert tokenizer.special_token_ids == {0}
    (tmp_path / "vocab.json").unlink()
    tokenizer = Tokenizer(files.write_words(tmp_path, WORDS))
    assert tokenizer.special_token_ids == {0, 1, 2, 3, 4}
    assert tokenizer.decode(tokenizer.encode("The wheel.")) == "the wheel."


def test_a_word_without_pieces_is_unknown(tmp_path: Path) -> None:
    tokenizer = Tokenizer(files.write_words(tmp_path, WORDS))
    assert tokenizer.encode("\u2603 the", False)[0] == WORDS.index("[UNK]")


def test_a_described_token_takes_the_spaces_before_it(tmp_path: Path) -> None:
    settings = {
        "tokenizer_class": "RobertaTokenizer",
        "mask_token": {"content": "<mask>", "lstrip": True},
    }
    tokenizer = Tokenizer(files.write_merges(tmp_path, BYTE_LEVEL, settings))
    the, mask = tokenizer.encode("the", False), BYTE_LEVEL.token_to_id("<mask>")
    assert tokenizer.encode("the  <mask>", False) == [*the, mask]


# Damaged files


def refusal(directory: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(directory)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("vocab.json", b"[]", "holds no JSON object"),
        ("vocab.json", b"{}", "must map tokens to ids"),
        ("vocab.json", b'{"a": 0, "b": 0}', "must map tokens to ids"),
        ("vocab.json", b'{"a": -1}', "must map tokens to ids"),
        ("vocab.json", b'{"a": "0"}', "must map tokens to ids"),
        ("vocab.json", b'{"a": 0}', "the merges do not fit the vocabulary"),
        ("merges.txt", b"#version: 0.2\na b c\n", "line 2 is not a pair"),
        ("merges.txt", b"ab\n", "line 1 is not a pair"),
        ("merges.txt", b"\xff", "cannot be read"),
    ],
)
def test_damaged_byte_level_files(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    files.write_merges(tmp_path, BYTE_LEVEL)
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path)
    assert reason in message and "again" in message
    assert str(tmp_path / name) in message


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\xff", "cannot be read"),
        (b"", "lacks '[UNK]'"),
        (b"[UNK]\n", "'[CLS]' is to be put before"),
        (b"[UNK]\n[CLS]\n", "'[SEP]' is to be put after"),
    ],
)
def test_damaged_word_lists(tmp_path: Path, content: bytes, reason: str) -> None:
    (tmp_path / "vocab.txt").write_bytes(content)
    message = refusal(tmp_path)
    assert str(tmp_path / "vocab.txt") in message and reason in message


@pytest.mark.parametrize("name", ["gpt2", "cased"])
def test_settings_that_are_not_supported(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    files.write_settings(tmp_path, {"tokenizer_class": "CLIPTokenizer"})
    assert "'CLIPTokenizer'" in refusal(tmp_path) and "convert it once" in refusal(tmp_path)
    files.write_settings(tmp_path, {"do_basic_tokenize": False, "add_prefix_space": 1})
    assert "do_basic_tokenize" in refusal(tmp_path) or "add_prefix_space" in refusal(tmp_path)
    files.write_settings(tmp_path, {"added_tokens_decoder": {"300": {"content": "the"}}})
    if name == "cased":
        assert "has id" in refusal(tmp_path)


@pytest.mark.parametrize("entry", ["bos_token", "additional_special_tokens"])
def test_a_token_that_is_no_text_is_named(tmp_path: Path, entry: str) -> None:
    token = {"content": "\ud800"}
    settings = {entry: token if entry == "bos_token" else [token]}
    files.write_words(tmp_path, WORDS, settings)
    assert "tokenizer_config.json names a token that is no valid Unicode" in refusal(tmp_path)


def test_half_of_the_files_are_not_enough(tmp_path: Path) -> None:
    files.write_merges(tmp_path, BYTE_LEVEL)
    (tmp_path / "merges.txt").unlink()
    assert "vocab.json with merges.txt" in refusal(tmp_path)
