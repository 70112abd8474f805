"""The tokenizer of a checkpoint: as transformers has it, and clear about damaged files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from headrace.errors import CheckpointError, InvalidRequestError
from headrace.text.tokenizer import Tokenizer
from tests.text import builders

KINDS = {"byte_level": builders.byte_level, "sentence_piece": builders.sentence_piece}
TEXTS = [
    "The headrace brings water.",
    " leading space and trailing space ",
    "Mühlgraben 水渠 🙂\n\tdone",
    "<|begin|>user text <|end|> more<｜rôle ▁｜>x<tool call>",
    "the</s> <s>the",
    "",
]


@pytest.fixture(params=sorted(KINDS))
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return builders.save(KINDS[request.param](), tmp_path)


def reference(directory: Path) -> Any:
    return PreTrainedTokenizerFast.from_pretrained(directory)


@pytest.mark.parametrize("add_special_tokens", [True, False])
@pytest.mark.parametrize("text", TEXTS)
def test_encodes_and_decodes_as_transformers(
    directory: Path, text: str, add_special_tokens: bool
) -> None:
    ours, theirs = Tokenizer(directory), reference(directory)
    ids = ours.encode(text, add_special_tokens)
    assert ids == theirs.encode(text, add_special_tokens=add_special_tokens)
    for skip in (True, False):
        expected = theirs.decode(ids, skip_special_tokens=skip)
        assert ours.decode(ids, skip_special_tokens=skip) == expected


@pytest.mark.parametrize("flag", [True, False])
def test_flags_in_the_settings_add_no_token(directory: Path, flag: bool) -> None:
    before = Tokenizer(directory)
    name = before.token_text(min(before.special_token_ids))
    flags = {"bos_token": name, "add_bos_token": flag, "add_eos_token": flag}
    write(directory, "tokenizer_config.json", flags)
    ids = Tokenizer(directory).encode("the water")
    assert ids == reference(directory).encode("the water") == before.encode("the water")


def test_settings_of_the_training_run_do_not_cut_or_fill_prompts(tmp_path: Path) -> None:
    tokenizer = builders.byte_level()
    plain = Tokenizer(builders.save(tokenizer, tmp_path / "plain"))
    tokenizer.enable_truncation(2)
    short = Tokenizer(builders.save(tokenizer, tmp_path / "short"))
    tokenizer.no_truncation()
    tokenizer.enable_padding(length=64)
    full = Tokenizer(builders.save(tokenizer, tmp_path / "full"))
    assert short.encode("one two three") == full.encode("one two three")
    assert full.encode("one two three") == plain.encode("one two three")


def test_named_tokens_of_the_vocabulary_become_special(tmp_path: Path) -> None:
    tokenizer = builders.words(None)
    names = {"eos_token": {"content": "it", "__type": "AddedToken"}, "pad_token": "[PAD]"}
    directory = builders.save(tokenizer, tmp_path, names | {"additional_special_tokens": ["run"]})
    ours, theirs = Tokenizer(directory), reference(directory)
    ids = [tokenizer.token_to_id(piece) for piece in ("it", "run", "▁the")]
    assert ours.special_token_ids == {0, *ids[:2]}
    assert ours.eos_token_id == ids[0]
    assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True) == "▁the"
    assert ours.encode("xxitxx") == theirs.encode("xxitxx")
    assert ours.vocab_size == tokenizer.get_vocab_size(), "a name without an id adds no token"


def write(directory: Path, name: str, value: object) -> None:
    (directory / name).write_text(json.dumps(value))


def test_end_tokens_come_from_the_first_file_that_names_them(tmp_path: Path) -> None:
    directory = builders.save(builders.byte_level(), tmp_path)
    begin, end = (Tokenizer(directory).encode(name)[0] for name in ("<|begin|>", "<|end|>"))
    assert Tokenizer(directory).eos_token_id is None
    write(directory, "config.json", {"bos_token_id": None, "eos_token_id": [77, 78]})
    assert Tokenizer(directory).bos_token_id is None
    assert Tokenizer(directory).eos_token_id == 77
    write(directory, "config.json", {"eos_token_id": 79})
    assert Tokenizer(directory).eos_token_id == 79
    write(directory, "special_tokens_map.json", {"eos_token": {"content": "<|end|>"}})
    assert Tokenizer(directory).eos_token_id == end
    write(directory, "tokenizer_config.json", {"eos_token": "<|begin|>"})
    assert Tokenizer(directory).eos_token_id == begin


def test_vocabulary(tmp_path: Path) -> None:
    package = builders.byte_level()
    tokenizer = Tokenizer(builders.save(package, tmp_path))
    assert tokenizer.vocab_size == package.get_vocab_size()
    specials = ("<|begin|>", "<|end|>", "<｜rôle ▁｜>")
    assert tokenizer.special_token_ids == {package.token_to_id(name) for name in specials}
    for name in specials:
        assert tokenizer.token_text(package.token_to_id(name)) == name


def test_a_vocabulary_with_gaps_ends_with_its_greatest_id(tmp_path: Path) -> None:
    directory = builders.save(builders.words(None), tmp_path)
    data = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    data["model"]["vocab"]["far"] = 50
    write(directory, "tokenizer.json", data)
    tokenizer = Tokenizer(directory)
    assert tokenizer.vocab_size == 51
    assert tokenizer.token_bytes(49) == b""
    assert tokenizer.token_text(49) == "<49>"
    assert tokenizer.token_text(50) == "far"


def test_bytes_of_byte_level_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(builders.save(builders.byte_level(), tmp_path))
    ids = tokenizer.encode(" Mühl水\n<tool call>")
    assert b"".join(map(tokenizer.token_bytes, ids)) == " Mühl水\n<tool call>".encode()
    letters = {bytes([b]) for b in range(256)}
    assert letters <= {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)}


def test_bytes_of_sentence_piece_tokens(tmp_path: Path) -> None:
    tokenizer = Tokenizer(builders.save(builders.sentence_piece(), tmp_path))
    ids = tokenizer.encode("the 水\n", add_special_tokens=False)
    assert b"".join(map(tokenizer.token_bytes, ids)) == " the 水\n".encode()
    assert tokenizer.token_text(tokenizer.encode("the")[1]) == " the"
    assert tokenizer.token_text(1) == "<s>"
    assert tokenizer.token_text(3 + 0xE6) == "\ufffd"


def test_tokens_of_other_decoders(tmp_path: Path) -> None:
    tokenizer = Tokenizer(builders.save(builders.words(None), tmp_path))
    assert tokenizer.token_bytes(1) == "▁the".encode()


@given(text=st.text(max_size=200) | st.text("ab <|end>▁\u00e9", max_size=200))
def test_no_token_is_longer_than_the_longest(
    tmp_path_factory: pytest.TempPathFactory, text: str
) -> None:
    for kind in KINDS.values():
        tokenizer = Tokenizer(builders.save(kind(), tmp_path_factory.mktemp("kind")))
        assert len(text) <= tokenizer.longest_token * len(tokenizer.encode(text))


def test_the_longest_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(builders.save(builders.words(None), tmp_path))
    assert tokenizer.longest_token == len("ning</w>")


@pytest.mark.parametrize("token_id", [-1, 10**6, 2**40])
def test_tokens_beyond_the_vocabulary(directory: Path, token_id: int) -> None:
    tokenizer = Tokenizer(directory)
    assert tokenizer.token_bytes(token_id) == b""
    assert tokenizer.token_text(token_id) == f"<{token_id}>"


@pytest.mark.parametrize("text", ["\ud800", "a\udfffb"])
def test_text_must_be_unicode(directory: Path, text: str) -> None:
    with pytest.raises(InvalidRequestError, match="surrogates") as caught:
        Tokenizer(directory).encode(text)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("ids", [[-1], [2**40], ["a"], None])
def test_only_token_ids_are_decoded(directory: Path, ids: Any) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        Tokenizer(directory).decode(ids)
    assert caught.value.field == "tokens"


# Damaged directories


def test_missing_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match=r"has no tokenizer.*tokenizer\.json.*copy it"
    ) as caught:
        Tokenizer(tmp_path)
    for name in ("tokenizer.model", "spiece.model", "vocab.json with merges.txt", "vocab.txt"):
        assert name in str(caught.value)


WHOLE = builders.sentence_piece().to_str().encode()
DAMAGED = [
    b"",
    b"not JSON",
    b"null",
    b"[]",
    b"{}",
    b'{"version": "1.0"}',
    b"\xff\xfe\x00",
    b"[" * 9999,
]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged.*download it again"):
        Tokenizer(tmp_path)


def test_a_tokenizer_that_makes_its_reader_panic_is_named(tmp_path: Path) -> None:
    directory = builders.save(builders.sentence_piece(), tmp_path)
    data = json.loads(WHOLE)
    data["model"]["continuing_subword_prefix"] = "x" * 50
    write(directory, "tokenizer.json", data)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        Tokenizer(directory)


@settings(max_examples=50)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_tokenizer_is_named(
    tmp_path_factory: pytest.TempPathFactory, share: float
) -> None:
    directory = tmp_path_factory.mktemp("truncated")
    (directory / "tokenizer.json").write_bytes(WHOLE[: int(len(WHOLE) * share)])
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is damaged"):
        Tokenizer(directory)


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "special_tokens_map.json", "config.json"]
)
@pytest.mark.parametrize("content", [b"{", b"[]", b"\xff", b"[" * 99999])
def test_damaged_settings_are_named(directory: Path, name: str, content: bytes) -> None:
    (directory / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} .*fetch it again"):
        Tokenizer(directory)
