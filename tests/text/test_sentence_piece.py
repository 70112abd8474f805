"""SentencePiece models: encoded as SentencePiece does, and refused when damaged."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import normalizers

from headrace.contracts.sampling import SamplingParams
from headrace.errors import CheckpointError
from headrace.text.tokenizer import Tokenizer
from headrace.text.vocabularies.charsmap import CharacterMap
from headrace.text.vocabularies.protobuf import Field, read_message
from headrace.text.vocabularies.sentence_piece import (
    Piece,
    PieceType,
    SentencePieceModel,
    build_sentence_piece,
)
from headrace.text.vocabularies.sentence_piece_file import read_sentence_piece
from tests.text import plain_sentence_piece as plain
from tests.text import vocabulary_files as files
from tests.text.builders import TEXT

MODELS = files.MODELS
LLAMA, GEMMA, T5 = (MODELS[name] for name in ("llama", "gemma", "t5"))
SYMBOLS = [piece for piece in GEMMA.pieces if piece.type is PieceType.USER_DEFINED]

texts = st.text(max_size=60) | st.text(sorted({*TEXT, "▁"}), max_size=120)
words = st.lists(st.sampled_from([*TEXT.split(), "  ", "\n", "<tool>", " "]), max_size=12)
prompts = (texts | words.map(" ".join) | words.map("".join)).filter(files.is_plain)


@pytest.fixture(scope="module")
def tokenizers_of(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tokenizer]:
    """Each model, by way of a file."""
    root = tmp_path_factory.mktemp("models")
    paths = {name: files.write_model(root / name, model) for name, model in MODELS.items()}
    return {name: Tokenizer(path) for name, path in paths.items()}


# Encoding


@pytest.mark.parametrize("name", sorted(MODELS))
@given(text=prompts)
def test_encodes_as_sentence_piece(
    tokenizers_of: dict[str, Tokenizer], name: str, text: str
) -> None:
    expected = plain.encode(MODELS[name], text)
    symbols = [piece.text for piece in SYMBOLS]
    if name == "symbols behind a prefix" and text.replace(" ", "▁") in symbols:
        expected = plain.encode(GEMMA, text)  # the one difference that is documented
    assert tokenizers_of[name].encode(text, add_special_tokens=False) == expected


@settings(max_examples=300)
@given(
    merged=st.lists(st.text("ab▁", min_size=2, max_size=5), max_size=12, unique=True),
    unigram=st.booleans(),
    text=st.text("ab ", max_size=24),
)
def test_any_pieces_encode_as_in_sentence_piece(
    merged: list[str], unigram: bool, text: str
) -> None:
    """Each merged piece is longer or worse than what it is made of, as training leaves it."""
    merged.sort(key=len)
    pieces = [Piece(text, -2.0 - rank) for rank, text in enumerate([*merged, *"ab▁"])]
    model = SentencePieceModel([*files.SPECIAL, *pieces], unigram=unigram)
    tokenizer = build_sentence_piece(model, {})
    assert tokenizer.encode(text).ids == plain.encode(model, text)


def test_the_comparison_covers_merges_bytes_and_unknown_characters() -> None:
    whole = plain.encode(LLAMA, "the water")
    assert len(whole) < len("the water") and min(whole) >= 259
    assert plain.encode(LLAMA, "\x07") == [*plain.encode(LLAMA, " ")[:1], 3 + 7]
    assert plain.encode(MODELS["no bytes"], "\x07\x08") == [plain.encode(LLAMA, " ")[0] - 256, 0]
    assert len(plain.encode(T5, "the water")) < len("the water")
    assert plain.encode(GEMMA, "a   b").count(GEMMA.pieces.index(SYMBOLS[1])) == 1


def test_control_pieces_are_special_and_cut_the_text(tokenizers_of: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_of["llama"]
    assert tokenizer.special_token_ids == {0, 1, 2}
    the = plain.encode(LLAMA, "the")
    assert tokenizer.encode("the</s>the", add_special_tokens=False) == [*the, 2, *the]
    assert tokenizer.decode([*the, 2]) == "the"
    assert tokenizer.decode([*the, 2], skip_special_tokens=False) == "the</s>"


def test_symbols_are_not_special(tokenizers_of: dict[str, Tokenizer]) -> None:
    tokenizer = tokenizers_of["gemma"]
    ids = tokenizer.encode("<tool>the", add_special_tokens=False)
    assert ids[0] == GEMMA.pieces.index(SYMBOLS[2]) and ids[0] not in tokenizer.special_token_ids
    assert tokenizer.decode(ids) == "<tool>the"


def test_names_of_bytes_in_a_text_are_text(tokenizers_of: dict[str, Tokenizer]) -> None:
    for name in ("llama", "unigram bytes"):
        ids = tokenizers_of[name].encode("say <0x41>", add_special_tokens=False)
        assert tokenizers_of[name].decode(ids) == "say <0x41>"
        assert MODELS[name].pieces.index(files.BYTES[0x41]) not in ids


def test_pieces_before_names_of_bytes_are_found() -> None:
    pieces = [Piece(text, -2.0) for text in ("▁<", *"▁<0x41>")]
    model = SentencePieceModel([*files.SPECIAL, *files.BYTES, *pieces], True, byte_fallback=True)
    ids = build_sentence_piece(model, {}).encode("<0x41>").ids
    assert ids == plain.encode(model, "<0x41>")
    assert model.pieces[ids[0]].text == "▁<"


def test_unused_pieces_are_not_found() -> None:
    for unigram in (True, False):
        pieces = [*files.SPECIAL, *(Piece(c, -5.0) for c in "▁ab"), Piece("ab", 0.0, PieceType(5))]
        model = SentencePieceModel(pieces, unigram=unigram)
        assert build_sentence_piece(model, {}).encode("ab").ids == [3, 4, 5]


# What stands around a text


def encoded(directory: Path, text: str) -> list[str]:
    tokenizer = Tokenizer(directory)
    return [tokenizer.token_text(index) for index in tokenizer.encode(text)]


@pytest.mark.parametrize(
    ("flags", "before", "after"),
    [
        (None, ["<s>"], []),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>"], ["</s>"]),
        ({"add_bos_token": False, "add_eos_token": None}, [], []),
        ({"tokenizer_class": "LlamaTokenizer", "bos_token": "</s>"}, ["</s>"], []),
        ({"bos_token": None}, [], []),
    ],
)
def test_flags_say_what_is_put_around_a_text(
    tmp_path: Path, flags: dict[str, Any] | None, before: list[str], after: list[str]
) -> None:
    directory = files.write_model(tmp_path, LLAMA, flags)
    bare = plain.encode(LLAMA, "the wheel")
    pieces = [LLAMA.pieces[index].text.replace("▁", " ") for index in bare]
    assert encoded(directory, "the wheel") == [*before, *pieces, *after]
    assert Tokenizer(directory).encode("the wheel", add_special_tokens=False) == bare


def test_the_prefix_is_put_once_if_the_settings_say_so(tmp_path: Path) -> None:
    always = Tokenizer(files.write_model(tmp_path / "always", LLAMA))
    once = Tokenizer(files.write_model(tmp_path / "once", LLAMA, {"legacy": False}))
    the, bare = plain.encode(LLAMA, "the"), plain.encode(GEMMA, "the")
    assert the != bare
    assert always.encode("the</s>the", False) == [*the, 2, *the]
    assert once.encode("the</s>the", False) == [*the, 2, *bare]
    for text in ("the", " the", "   the", ""):
        assert once.encode(text, False) == always.encode(text, False) == plain.encode(LLAMA, text)


def test_the_settings_decide_about_the_prefix(tmp_path: Path) -> None:
    directory = files.write_model(tmp_path, LLAMA, {"add_prefix_space": False})
    assert Tokenizer(directory).encode("the", False) == plain.encode(GEMMA, "the")


def test_added_tokens_have_their_ids_and_flags(tmp_path: Path) -> None:
    added = {
        "262": {"content": "<|user|>", "special": True, "rstrip": True},
        str(len(LLAMA.pieces) + 2): {"content": "<call>", "special": False, "normalized": True},
    }
    directory = files.write_model(tmp_path, LLAMA, {"added_tokens_decoder": added})
    tokenizer = Tokenizer(directory)
    the, bare = plain.encode(LLAMA, "the"), plain.encode(GEMMA, "the")
    ids = tokenizer.encode("the<|user|>  the<call>", add_special_tokens=False)
    assert ids == [*the, 262, *the, len(LLAMA.pieces) + 2] and bare != the
    assert tokenizer.special_token_ids == {0, 1, 2, 262}
    assert tokenizer.vocab_size == len(LLAMA.pieces) + 3
    assert tokenizer.token_text(262) == "<|user|>"


def test_added_tokens_of_a_file_of_their_own(tmp_path: Path) -> None:
    directory = files.write_model(tmp_path, LLAMA, {"eos_token": "<|end|>"})
    (directory / "added_tokens.json").write_text(f'{{"<|end|>": {len(LLAMA.pieces)}}}')
    tokenizer = Tokenizer(directory)
    assert (
        tokenizer.eos_token_id == len(LLAMA.pieces)
        and len(LLAMA.pieces) in tokenizer.special_token_ids
    )


def test_t5_ends_a_text_and_has_sentinels(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "T5TokenizerFast", "extra_ids": 3}
    directory = files.write_model(tmp_path, T5, settings, "spiece.model")
    tokenizer = Tokenizer(directory)
    the = plain.encode(T5, "the")
    assert tokenizer.encode("the<extra_id_0> the") == [*the, len(T5.pieces) + 2, *the, 2]
    assert tokenizer.token_text(len(T5.pieces)) == "<extra_id_2>"
    assert tokenizer.eos_token_id == 2 and tokenizer.bos_token_id is None


def test_xlm_roberta_has_the_ids_of_fairseq(tmp_path: Path) -> None:
    settings = {"tokenizer_class": "XLMRobertaTokenizer"}
    directory = files.write_model(tmp_path, T5, settings, "sentencepiece.bpe.model")
    tokenizer = Tokenizer(directory)
    shifted = [3 if index == 0 else index + 1 for index in plain.encode(T5, "the \x07wheel")]
    assert tokenizer.encode("the \x07wheel") == [0, *shifted, 2] and 3 in shifted
    assert tokenizer.encode("<mask>")[1] == len(T5.pieces) + 1
    assert tokenizer.special_token_ids == {0, 1, 2, 3, len(T5.pieces) + 1}


def test_albert_takes_accents_and_capitals_away(tmp_path: Path) -> None:
    control = [
        Piece(text, 0.0, PieceType.CONTROL) for text in ("<pad>", "[CLS]", "[SEP]", "[MASK]")
    ]
    pieces = [control[0], files.SPECIAL[0], *control[1:], *T5.pieces[3:], Piece("1,", -1.0)]
    pieces += [Piece("1", -20.0), Piece('"', -9.0)]
    model = dataclasses.replace(T5, pieces=pieces, names={})
    directory = files.write_model(tmp_path, model, {"tokenizer_class": "AlbertTokenizer"})
    ids = Tokenizer(directory).encode("THE  Wässer ``1,''")
    texts = [pieces[index].text for index in ids]
    assert texts[0] == "[CLS]" and texts[-1] == "[SEP]"
    assert "".join(texts[1:-1]) == '▁the▁wasser▁"1,"'
    assert "1," not in texts, "the comma stands alone"
    keeping = {"tokenizer_class": "AlbertTokenizer", "do_lower_case": False, "keep_accents": True}
    kept = Tokenizer(files.write_model(tmp_path / "kept", model, keeping))
    assert kept.decode(kept.encode("Mühlgraben")) == "Mühlgraben"


# Maps of characters

REPLACEMENTS = files.REPLACEMENTS
CHARSMAP = files.charsmap_bytes(REPLACEMENTS)
parts_to_replace = st.lists(
    st.sampled_from([*REPLACEMENTS, *"at水é\u0302\u200d\0\n ", "<tool>", "the", " w"]), max_size=12
).map("".join)


def replaced(charsmap: bytes, text: str, *kept: str) -> str:
    normalizer = normalizers.Normalizer.custom(CharacterMap(charsmap, kept))
    return str(normalizer.normalize_str(text))


@given(text=parts_to_replace | st.text(max_size=20))
def test_characters_are_replaced(text: str) -> None:
    assert replaced(CHARSMAP, text) == plain.replace(T5, text, REPLACEMENTS)
    symbols = [piece.text for piece in SYMBOLS]
    assert replaced(CHARSMAP, text, *symbols) == plain.replace(GEMMA, text, REPLACEMENTS)


def test_the_longest_string_is_replaced_and_no_mark_is_lost() -> None:
    assert replaced(CHARSMAP, "e\u0301e\u0302") == "ée\u0302"
    assert replaced(CHARSMAP, "ａ\u0302\u200b") == "a\u0302"
    assert replaced(CHARSMAP, "\t") == " " and replaced(CHARSMAP, "\ta\t", "\t", "\ta") == "\ta\t"
    assert replaced(CHARSMAP, "\u200b") == replaced(CHARSMAP, "") == ""


MAPPED = {
    name: build_sentence_piece(dataclasses.replace(MODELS[name], charsmap=CHARSMAP), {})
    for name in ("t5", "unigram symbols", "no bytes", "single spaces")
}


@pytest.mark.parametrize("name", MAPPED)
@given(text=parts_to_replace)
def test_a_model_with_a_map_of_characters(name: str, text: str) -> None:
    assert MAPPED[name].encode(text).ids == plain.encode(MODELS[name], text, REPLACEMENTS)


@settings(max_examples=300)
@given(position=st.integers(0, len(CHARSMAP) - 1), byte=st.integers(0, 255), text=st.text())
def test_no_damaged_map_of_characters_ends_the_program(position: int, byte: int, text: str) -> None:
    damaged = bytearray(CHARSMAP)
    damaged[position] = byte
    try:
        character_map = CharacterMap(bytes(damaged))
    except ValueError:
        return
    normalizer = normalizers.Normalizer.custom(character_map)
    for character in text + "".join(REPLACEMENTS) + "ａｂｃ①②ﬀﬁ\u0300\u0301":
        normalizer.normalize_str(character)


@pytest.mark.parametrize(
    "charsmap",
    [b"abc", CHARSMAP[:40], CHARSMAP[:-1], b"\xff\xff\xff\xff" + CHARSMAP[4:], b"\0\0\0\0a\0"],
)
def test_a_truncated_map_of_characters(tmp_path: Path, charsmap: bytes) -> None:
    directory = files.write_model(tmp_path, dataclasses.replace(T5, charsmap=charsmap))
    with pytest.raises(CheckpointError, match=r"tokenizer\.model is damaged.*download"):
        Tokenizer(directory)


# Detokenizing


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    stream = tokenizer.stream(SamplingParams(skip_special_tokens=skip))
    assert stream is not None
    return "".join([stream.push(index) for index in ids] + [stream.finish()])


def whole_characters(model: SentencePieceModel) -> st.SearchStrategy[list[int]]:
    """Any tokens, but only such runs of bytes as are text."""
    octets = {p.text: i for i, p in enumerate(model.pieces) if p.type is PieceType.BYTE}
    others = [[i] for i in range(len(model.pieces) + 2) if i not in octets.values()]
    parts = st.sampled_from(others)
    if octets:
        characters = st.characters(codec="utf-8").map(str.encode)
        parts |= characters.map(lambda data: [octets[f"<0x{byte:02X}>"] for byte in data])
    return st.lists(parts, max_size=20).map(lambda found: [i for part in found for i in part])


@pytest.mark.parametrize("name", sorted(MODELS))
@given(data=st.data(), skip=st.booleans())
def test_a_stream_continues_a_prompt_as_decoding_does(
    tokenizers_of: dict[str, Tokenizer], name: str, data: st.DataObject, skip: bool
) -> None:
    tokenizer, ids = tokenizers_of[name], data.draw(whole_characters(MODELS[name]))
    prompt = tokenizer.encode("the water")
    whole = tokenizer.decode([*prompt, *ids], skip_special_tokens=skip)
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    assert before + streamed(tokenizer, ids, skip) == whole


@given(text=prompts)
def test_a_text_comes_back(tokenizers_of: dict[str, Tokenizer], text: str) -> None:
    """But for "▁", which is a space."""
    for name in ("llama", "gemma"):
        tokenizer = tokenizers_of[name]
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")
        prefix = " " if MODELS[name].add_dummy_prefix and text else ""
        assert streamed(tokenizer, ids, True) == prefix + text.replace("▁", " ")


# Damaged files

SMALL = dataclasses.replace(
    LLAMA, pieces=[*files.SPECIAL, *LLAMA.pieces[259:275]], byte_fallback=False
)
WHOLE = files.model_bytes(SMALL)


def refusal(directory: Path, content: bytes) -> str:
    (directory / "tokenizer.model").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(directory)
    assert str(directory / "tokenizer.model") in str(caught.value)
    return str(caught.value)


def spoilt(change: Callable[[list[Piece]], Any]) -> bytes:
    pieces = list(SMALL.pieces)
    change(pieces)
    return files.model_bytes(dataclasses.replace(SMALL, pieces=pieces))


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "no pieces"),
        (b"{}", "wire type|bytes|field"),
        (b"IQ== 0\nIg== 1\n", "no pieces"),
        (b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01", "does not end"),
        (b"\x0a\x05ab", "asks for 5 bytes, of which 2 are left"),
        (b"\x00\x01", "no field 0"),
        (b"\x0b\x0c", "wire type 3"),
        (WHOLE + files.wire(1, 5), "wire type 0 instead of 2"),
        (WHOLE + files.wire(1, files.wire(1, b"\xff")), "utf-8"),
        (WHOLE + files.wire(1, files.wire(1, "x") + files.wire(3, 9)), "not a valid PieceType"),
        (WHOLE + files.wire(1, files.wire(2, 1.0)), "piece 19 is empty"),
        (WHOLE + files.wire(1, files.wire(1, "x") + files.wire(2, float("nan"))), "is nan"),
        (spoilt(lambda pieces: pieces.append(pieces[5])), "pieces 5 and 19 are both"),
        (spoilt(lambda pieces: pieces.pop(0)), "0 pieces stand for unknown"),
        (spoilt(lambda pieces: pieces.append(Piece("?", 0.0, PieceType(2)))), "2 pieces stand"),
        (files.model_bytes(SMALL, {3: 3}), r"of type 3.*take a checkpoint with tokenizer\.json"),
        (files.model_bytes(SMALL, {24: True}), "treat_whitespace_as_suffix True"),
        (WHOLE + files.wire(3, files.wire(5, False)), "escape_whitespaces False"),
    ],
)
def test_a_damaged_model_is_named(tmp_path: Path, content: bytes, reason: str) -> None:
    assert re.search(reason, refusal(tmp_path, content))


@settings(max_examples=200)
@given(position=st.integers(0, len(WHOLE) - 1), byte=st.integers(0, 255), cut=st.booleans())
def test_damage_is_found_or_harmless(
    tmp_path_factory: pytest.TempPathFactory, position: int, byte: int, cut: bool
) -> None:
    damaged = WHOLE[:position] if cut else WHOLE[:position] + bytes([byte]) + WHOLE[position + 1 :]
    path = tmp_path_factory.mktemp("damaged") / "tokenizer.model"
    path.write_bytes(damaged)
    try:
        tokenizer = Tokenizer(path.parent)
    except CheckpointError:
        return
    tokenizer.decode(tokenizer.encode("the water"))


@given(number=st.integers(-(2**31), 2**31 - 1))
def test_integers_have_a_sign(number: int) -> None:
    message = memoryview(files.wire(43, number))
    assert read_message(message, {43: ("pad_id", Field.integer)}) == {"pad_id": number}


def test_what_a_file_says(tmp_path: Path) -> None:
    for model in (LLAMA, dataclasses.replace(T5, charsmap=CHARSMAP)):
        (tmp_path / "m.model").write_bytes(files.model_bytes(model))
        assert read_sentence_piece(tmp_path / "m.model") == model


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"added_tokens_decoder": []}, "added_tokens_decoder must name tokens by their ids"),
        ({"added_tokens_decoder": {"x": {"content": "y"}}}, "added_tokens_decoder must name"),
        ({"added_tokens_decoder": {"5": {}}}, "added_tokens_decoder must name"),
        ({"added_tokens_decoder": {"999999999": {"content": "y"}}}, "added_tokens_decoder must"),
        ({"added_tokens_decoder": {"9": {"content": "<s>"}}}, "has id 1, but .* say 9"),
        ({"add_bos_token": "yes"}, "add_bos_token must be true or false"),
        ({"bos_token": "<start>"}, "'<start>' is to be put before every text"),
    ],
)
def test_settings_that_do_not_fit_are_named(
    tmp_path: Path, settings: dict[str, Any], reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        Tokenizer(files.write_model(tmp_path, LLAMA, settings))


def test_a_class_that_rearranges_a_unigram_model_is_refused(tmp_path: Path) -> None:
    directory = files.write_model(tmp_path, T5, {"tokenizer_class": "CamembertTokenizer"})
    with pytest.raises(CheckpointError, match=r"CamembertTokenizer.*convert it once"):
        Tokenizer(directory)
