"""Vocabularies in the metadata of GGUF files: the same tokens as from the models' own files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Regex,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.tokenization_utils_base import generate_merges

from headrace.contracts.sampling import SamplingParams
from headrace.errors import CheckpointError, InvalidRequestError
from headrace.text.tokenizer import Tokenizer
from headrace.text.vocabularies.byte_level import build_byte_level
from headrace.text.vocabularies.pre_tokenizers import PRE_TOKENIZERS
from headrace.text.vocabularies.sentence_piece import Piece, PieceType
from headrace.weights.gguf.file import GGUFFile
from tests.text import builders
from tests.text import plain_sentence_piece as plain
from tests.text import vocabulary_files as files
from tests.text.builders import TEXT
from tests.text.vocabulary_files import MODELS, NUMBERS, WORDS

MORE = (
    "camelCase HTTPServer 2024-12-31 x=[1,2,3]; path/to/file's\n\n  indented `code` ｡！"
    "漢字かなカナ 한글"
)
LLAMA, GEMMA, T5 = (MODELS[name] for name in ("llama", "gemma", "t5"))
CHARSMAP = files.charsmap_bytes(files.REPLACEMENTS)
NAMES = ("<|begin|>", "<|end|>")

texts = st.text(max_size=60) | st.text(sorted({*TEXT, *NUMBERS, *MORE}), max_size=120)
parts = st.lists(
    st.sampled_from([*TEXT.split(), *NUMBERS.split(), *MORE.split(), " ", "  ", "\n", "<call>"]),
    max_size=12,
)
prompts = (texts | parts.map(" ".join) | parts.map("".join)).filter(files.is_plain)


def split(*patterns: str) -> Any:
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    steps = [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    return pre_tokenizers.Sequence(steps)


def gpt2(*before: Any) -> Any:
    last = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return pre_tokenizers.Sequence([*before, last])


DIGITS = gpt2(pre_tokenizers.Digits(individual_digits=True))

DEEPSEEK_CODER = pre_tokenizers.Sequence(
    [
        *(
            pre_tokenizers.Split(Regex(pattern), "isolated")
            for pattern in ("[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+")
        ),
        pre_tokenizers.Digits(individual_digits=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
DEEPSEEK_V3 = split(
    r"\p{N}{1,3}",
    "[一-龥぀-ゟ゠-ヿ]+",
    "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
    "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
)
NFC = normalizers.NFC()
ORIGINALS = {
    "gpt-2": (gpt2(), None),
    "phi-2": (gpt2(), None),
    "olmo": (gpt2(), NFC),
    "starcoder": (DIGITS, None),
    "refact": (DIGITS, None),
    "smollm": (DIGITS, None),
    "command-r": (DIGITS, NFC),
    "falcon": (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Punctuation("contiguous"),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
                pre_tokenizers.Digits(individual_digits=False),
                pre_tokenizers.Split(Regex("[0-9][0-9][0-9]"), "isolated"),
            ]
        ),
        None,
    ),
    "deepseek-coder": (DEEPSEEK_CODER, None),
    "deepseek-v3": (DEEPSEEK_V3, None),
    "llama-bpe": (split(GGUF_PRE_TOKENIZER_SPLITS["llama-bpe"]), None),
    "qwen2": (split(GGUF_PRE_TOKENIZER_SPLITS["qwen2"]), NFC),
    "tekken": (split(GGUF_PRE_TOKENIZER_SPLITS["tekken"]), None),
    "gpt-4o": (split(GGUF_PRE_TOKENIZER_SPLITS["gpt-4o"]), None),
}
"""What the models' own files do before byte-level BPE."""


def trained(name: str) -> tokenizers.Tokenizer:
    """A tokenizer of a family, as its ``tokenizer.json`` has it."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, normalizer = ORIGINALS[name]
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=460,
        special_tokens=list(NAMES),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT, NUMBERS, MORE] * 3, trainer)
    model = tokenizer.model
    model.ignore_merges = PRE_TOKENIZERS[name].ignores_merges
    tokenizer.model = model
    tokenizer.add_tokens([AddedToken("<call>", special=False, normalized=False)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<|begin|>", "$A", "<|end|>"], special_tokens=[("<|begin|>", 0), ("<|end|>", 1)]
    )
    return tokenizer


def metadata_of(tokenizer: tokenizers.Tokenizer, name: str) -> dict[str, Any]:
    """The metadata of a GGUF file with the tokenizer of a family."""
    ids = tokenizer.get_vocab()
    texts = sorted(ids, key=ids.__getitem__)
    kinds = {**dict.fromkeys(NAMES, PieceType.CONTROL), "<call>": PieceType.USER_DEFINED}
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    return files.gguf(
        "gpt2",
        texts,
        pre=name,
        merges=[" ".join(pair) for pair in merges],
        token_type=[int(kinds.get(text, PieceType.NORMAL)) for text in texts],
        bos_token_id=0,
        eos_token_id=1,
        add_bos_token=True,
        add_eos_token=True,
    )


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tokenizer, Tokenizer]]:
    """Each family from its GGUF file and from its ``tokenizer.json``."""
    pairs = {}
    for name in ORIGINALS:
        tokenizer = trained(name)
        names = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
        directory = builders.save(tokenizer, tmp_path_factory.mktemp("json"), names)
        pairs[name] = Tokenizer.from_gguf(metadata_of(tokenizer, name)), Tokenizer(directory)
    return pairs


@pytest.mark.parametrize("name", sorted(ORIGINALS))
@given(text=prompts, special=st.booleans())
def test_byte_level_tokens_are_those_of_the_original(
    families: dict[str, tuple[Tokenizer, Tokenizer]], name: str, text: str, special: bool
) -> None:
    ours, original = families[name]
    ids = ours.encode(text, special)
    assert ids == original.encode(text, special)
    assert ours.decode(ids) == original.decode(ids)
    assert ours.special_token_ids == original.special_token_ids == {0, 1}
    assert (ours.bos_token_id, ours.eos_token_id) == (0, 1)


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("default", "a.b 1234 it's", ["a", ".", "b", " ", "123", "4", " it", "'", "s"]),
        ("deepseek-llm", "ab\n x!  漢字12 ", ["ab", "\n", " x", "!", "  ", "漢字", "12", " "]),
        ("deepseek-coder", "ab 12,漢", ["ab", " ", "1", "2", ",", "漢"]),
        ("deepseek-v3", "ab 1234 漢字かx!y", ["ab", " ", "123", "4", " ", "漢字か", "x", "!y"]),
        ("deepseek-llm", "Ｋelvin ʔx１２３。x", ["Ｋelvin", " ʔ", "x", "１２３", "。", "x"]),
        ("qwen35", "न\u093fx 12", ["न\u093fx", " ", "1", "2"]),
        ("stablelm2", "न\u093fx 12", ["न", "\u093fx", " ", "1", "2"]),
    ],
)
def test_text_is_cut_as_the_name_says(name: str, text: str, expected: list[str]) -> None:
    alphabet = {letter: i for i, letter in enumerate(pre_tokenizers.ByteLevel.alphabet())}
    tokenizer = build_byte_level(alphabet, [], PRE_TOKENIZERS[name], "test")
    found = tokenizer.pre_tokenizer.pre_tokenize_str(text)
    assert [text[start:end] for _, (start, end) in found] == expected


DISTINCT = {
    (PRE_TOKENIZERS[name].splits, theirs): name
    for name, theirs in GGUF_PRE_TOKENIZER_SPLITS.items()
}
"""One name for each way that transformers knows, and more if we disagree about any."""


@pytest.mark.parametrize(("splits", "theirs"), DISTINCT, ids=DISTINCT.values())
@given(text=prompts)
def test_text_is_cut_as_transformers_cuts_it(
    splits: tuple[str, ...], theirs: str, text: str
) -> None:
    ours = [pre_tokenizers.Split(Regex(each), "isolated") for each in splits]
    found = pre_tokenizers.Sequence(ours).pre_tokenize_str(text)
    assert found == pre_tokenizers.Split(Regex(theirs), "isolated").pre_tokenize_str(text)


def test_every_name_that_is_known_can_be_used() -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    for name, way in PRE_TOKENIZERS.items():
        metadata = files.gguf("gpt2", alphabet, merges=[], pre=name, bos_token_id=5)
        with pytest.raises(CheckpointError, match="merges must be a list of strings"):
            Tokenizer.from_gguf(metadata)
        metadata = files.gguf("gpt2", [*alphabet, "ab"], merges=["a b"], pre=name, bos_token_id=5)
        tokenizer = Tokenizer.from_gguf(metadata)
        assert tokenizer.encode("xabx", False)[1] == 256 or name == "default"
        assert (tokenizer.encode("")[:1] == [5]) == way.adds_bos


# SentencePiece


def llama_metadata(model: Any, **entries: Any) -> dict[str, Any]:
    """As converted: spaces in user-defined symbols are plain."""
    pieces = [
        piece._replace(text=piece.text.replace("▁", " ")) if piece.type == 4 else piece
        for piece in model.pieces
    ]
    return files.gguf_pieces("llama", pieces, **entries)


LLAMAS = [
    (model, Tokenizer.from_gguf(llama_metadata(model, add_space_prefix=model.add_dummy_prefix)))
    for model in (LLAMA, GEMMA)
]


@given(text=prompts)
def test_llama_tokens_are_those_of_sentence_piece(text: str) -> None:
    for model, tokenizer in LLAMAS:
        assert tokenizer.encode(text) == [1, *plain.encode(model, text)]
        assert tokenizer.decode(tokenizer.encode(text)) == text.replace("▁", " ")


def llama_original() -> tokenizers.Tokenizer:
    """The ``tokenizer.json`` of models like Llama 2 with the same pieces."""
    ids = {piece.text: index for index, piece in enumerate(LLAMA.pieces)}
    merges = generate_merges(ids, {piece.text: piece.score for piece in LLAMA.pieces})
    tokenizer = tokenizers.Tokenizer(
        models.BPE(ids, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    tokenizer.normalizer = normalizers.Sequence(spaces)
    last = [decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), *last])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=["<s>", "$A"], special_tokens=[("<s>", 1)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    return tokenizer


LLAMA_ORIGINAL = llama_original()


@given(text=texts | parts.map("<s>".join) | parts.map("</s> ".join))
def test_llama_tokens_are_those_of_the_original(text: str) -> None:
    ours = LLAMAS[0][1]
    ids = ours.encode(text)
    assert ids == LLAMA_ORIGINAL.encode(text).ids
    for skip in (True, False):
        assert ours.decode(ids, skip) == LLAMA_ORIGINAL.decode(ids, skip_special_tokens=skip)


@given(text=prompts)
def test_t5_tokens_are_those_of_sentence_piece(text: str) -> None:
    pieces = [Piece("<pad>", 0.0, PieceType.CONTROL), T5.pieces[2], T5.pieces[0], *T5.pieces[3:]]
    model = dataclasses.replace(T5, pieces=pieces)
    spaces = {"add_space_prefix": True, "remove_extra_whitespaces": True}
    tokenizer = Tokenizer.from_gguf(files.gguf_pieces("t5", pieces, **spaces))
    assert tokenizer.encode(text) == [*plain.encode(model, text), 1]


def test_t5_with_a_map_of_characters() -> None:
    signed = [byte - 256 if byte > 127 else byte for byte in CHARSMAP]
    for octets in (list(CHARSMAP), signed, CHARSMAP):
        metadata = files.gguf_pieces(
            "t5",
            T5.pieces,
            precompiled_charsmap=octets,
            unknown_token_id=0,
            add_space_prefix=True,
        )
        tokenizer = Tokenizer.from_gguf(metadata)
        assert tokenizer.encode("the\twater", False) == plain.encode(T5, "the water")


def test_the_unknown_token_needs_no_type() -> None:
    metadata = llama_metadata(LLAMA)
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = Tokenizer.from_gguf(metadata)
    assert tokenizer.special_token_ids == {0}
    assert tokenizer.encode("the", False) == plain.encode(LLAMA, "the")


# BERT


def bert_metadata(**entries: Any) -> dict[str, Any]:
    """As converted: pieces that begin a word are marked instead of those that continue it."""

    def converted(word: str) -> str:
        if word.startswith("["):
            return word
        return word[2:] if word.startswith("##") else f"▁{word}"

    kinds = [3 if word.startswith("[") else 1 for word in WORDS]
    ids = {
        "unknown_token_id": 1,
        "bos_token_id": 2,
        "seperator_token_id": 3,
        "padding_token_id": 0,
        "mask_token_id": 4,
    }
    texts = [converted(word) for word in WORDS]
    return files.gguf("bert", texts, token_type=kinds, **ids, **entries)


@pytest.fixture(scope="module", params=[True, False], ids=["uncased", "cased"])
def bert(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Tokenizer, Tokenizer]:
    """From a GGUF file and from a ``vocab.txt``."""
    settings = {"do_lower_case": request.param}
    original = Tokenizer(files.write_words(tmp_path_factory.mktemp("bert"), WORDS, settings))
    return Tokenizer.from_gguf(bert_metadata(normalizer__lowercase=request.param)), original


@given(text=prompts)
def test_bert_tokens_are_those_of_the_original(
    bert: tuple[Tokenizer, Tokenizer], text: str
) -> None:
    tokenizer, original = bert
    ids = tokenizer.encode(text)
    assert ids == original.encode(text)
    assert tokenizer.decode(ids) == original.decode(ids)


# Detokenizing

KINDS = {
    "llama": llama_metadata(LLAMA),
    "gemma": llama_metadata(GEMMA, add_space_prefix=False),
    "t5": files.gguf_pieces("t5", T5.pieces, unknown_token_id=0, add_space_prefix=True),
    "bert": bert_metadata(),
    "gpt2": metadata_of(trained("gpt-2"), "gpt-2"),
}


TOKENIZERS = {name: Tokenizer.from_gguf(metadata) for name, metadata in KINDS.items()}


def streamed(tokenizer: Tokenizer, ids: list[int], skip: bool) -> str:
    stream = tokenizer.stream(SamplingParams(skip_special_tokens=skip))
    assert stream is not None
    return "".join([stream.push(index) for index in ids] + [stream.finish()])


@pytest.mark.parametrize("name", sorted(KINDS))
@given(data=st.data(), skip=st.booleans())
def test_a_stream_equals_decoding(name: str, data: st.DataObject, skip: bool) -> None:
    """Runs of single bytes set aside, which decoding at once replaces whole where one is wrong."""
    tokenizer = TOKENIZERS[name]
    octets = {i for i in range(tokenizer.vocab_size) if tokenizer.token_text(i) == "\ufffd"}
    single = octets if name in ("llama", "gemma") else set[int]()
    whole = [i for i in range(tokenizer.vocab_size + 3) if i not in single]
    ids = data.draw(st.lists(st.sampled_from(whole), max_size=30))
    released = streamed(tokenizer, ids, skip)
    strips = name in ("llama", "t5")
    assert (released.removeprefix(" ") if strips else released) == tokenizer.decode(ids, skip)


@pytest.mark.parametrize("name", ["gemma", "gpt2", "llama", "t5"])
@given(data=st.data())
def test_a_stream_is_the_text_of_the_bytes(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=30))
    octets = b"".join(map(tokenizer.token_bytes, ids))
    assert streamed(tokenizer, ids, False) == octets.decode("utf-8", "replace")


@pytest.mark.parametrize("name", ["gemma", "gpt2", "llama"])
@given(text=prompts)
def test_the_bytes_of_a_text_come_back(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    ids = tokenizer.encode(text, add_special_tokens=False)
    prefix = " " if name == "llama" and text else ""
    expected = prefix + (text if name == "gpt2" else text.replace("▁", " "))
    assert b"".join(map(tokenizer.token_bytes, ids)) == expected.encode()
    assert streamed(tokenizer, ids, True) == expected


# Files


@pytest.mark.parametrize("name", sorted(KINDS))
def test_a_file_holds_what_its_metadata_say(tmp_path: Path, name: str) -> None:
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in KINDS[name].items():
        if key != "general.architecture":
            kind = gguf.GGUFValueType.UINT32 if type(value) is int else None
            writer.add_key_value(key, value, kind or gguf.GGUFValueType.get_type(value))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer, expected = Tokenizer.from_gguf(GGUFFile(path).metadata), TOKENIZERS[name]
    for text in (TEXT, NUMBERS, MORE, "<s>the</s> <call>", ""):
        ids = tokenizer.encode(text)
        assert ids == expected.encode(text)
        assert tokenizer.decode(ids) == expected.decode(ids)
    assert tokenizer.special_token_ids == expected.special_token_ids
    assert tokenizer.bos_token_id == expected.bos_token_id
    assert tokenizer.eos_token_id == expected.eos_token_id


# Chat templates


def test_chat_templates() -> None:
    templates = {
        "tokenizer.chat_template": "{{ bos_token }}{{ messages | length }}",
        "tokenizer.chat_template.tool_use": "tools {{ tools | length }}",
        "tokenizer.chat_templates": ["tool_use"],
    }
    tokenizer = Tokenizer.from_gguf(llama_metadata(LLAMA) | templates)
    message = {"role": "user", "content": "x"}
    assert tokenizer.apply_chat_template([message]) == "<s>1"
    assert tokenizer.apply_chat_template([message], tools=[{}]) == "tools 1"
    assert not Tokenizer.from_gguf(llama_metadata(LLAMA)).has_chat_template


def test_a_bad_template_is_named() -> None:
    metadata = llama_metadata(LLAMA) | {"tokenizer.chat_template.rag": "{% for %}"}
    with pytest.raises(CheckpointError, match=r"'rag' in model\.gguf is not valid"):
        Tokenizer.from_gguf(metadata, "model.gguf")
    metadata = llama_metadata(LLAMA) | {"tokenizer.chat_template": "{{ nothing.at.all }}"}
    with pytest.raises(InvalidRequestError, match=r"'default' of model\.gguf refuses"):
        Tokenizer.from_gguf(metadata, "/x/model.gguf").apply_chat_template([{"role": "user"}])
    with pytest.raises(CheckpointError, match=r"tokenizer\.chat_template must be a string"):
        Tokenizer.from_gguf(llama_metadata(LLAMA) | {"tokenizer.chat_template": 5})


# Damaged metadata


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": None}, "model must be a string"),
        ({"model": "rwkv"}, "model is 'rwkv', which is not known; known are llama, gpt2, bert, t5"),
        ({"tokens": []}, "tokens must be a list of strings"),
        ({"tokens": "abc"}, "tokens must be a list"),
        ({"tokens": [1, 2]}, "tokens must be a list of strings"),
        ({"tokens": ["a", "\udcff"]}, "tokens has strings that are no UTF-8"),
        ({"tokens": ["a", "b", "a"]}, "tokens has 'a' 2 times"),
        ({"scores": [1.0]}, "scores must be a list of .* numbers"),
        ({"scores": 3}, "scores must be a list"),
        ({"token_type": [9] * len(LLAMA.pieces)}, "token_type has an unknown type"),
        ({"token_type": [float("inf")] * len(LLAMA.pieces)}, "token_type has an unknown type"),
        ({"bos_token_id": 10**6}, "bos_token_id must be a token id below"),
        ({"eos_token_id": "x"}, "eos_token_id must be a token id below"),
        ({"eos_token_id": 1.5}, "eos_token_id must be a token id below"),
        ({"add_bos_token": "yes"}, "add_bos_token must be true or false"),
        ({"add_bos_token": [True, False]}, "add_bos_token must be true or false"),
        ({"token_type": [1] * len(LLAMA.pieces), "unknown_token_id": None}, ""),
    ],
)
def test_damaged_entries_are_named(changes: dict[str, Any], reason: str) -> None:
    metadata = llama_metadata(LLAMA)
    for name, value in changes.items():
        metadata[f"tokenizer.ggml.{name}"] = value
    if not reason:
        Tokenizer.from_gguf(metadata)
        return
    with pytest.raises(CheckpointError, match=rf"x\.gguf: tokenizer\.ggml\.{reason}"):
        Tokenizer.from_gguf(metadata, "x.gguf")


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"pre": "unheard-of"},
            "pre is 'unheard-of', which is not known; known are default, gpt-2, .*; take the check",
        ),
        ({"pre": 5}, "pre must be a string"),
        ({"merges": ["ab"]}, "merges has 'ab', which is no pair"),
        ({"bos_token_id": None}, "bos_token_id is missing, but add_bos_token asks for"),
    ],
)
def test_damaged_byte_level_entries_are_named(changes: dict[str, Any], reason: str) -> None:
    metadata = KINDS["gpt2"] | {f"tokenizer.ggml.{name}": v for name, v in changes.items()}
    with pytest.raises(CheckpointError, match=rf"tokenizer\.ggml\.{reason}"):
        Tokenizer.from_gguf(metadata)


def test_merges_of_no_tokens_are_refused() -> None:
    metadata = KINDS["gpt2"] | {"tokenizer.ggml.merges": ["zz yy"]}
    with pytest.raises(CheckpointError, match="the merges do not fit the vocabulary"):
        Tokenizer.from_gguf(metadata)


def test_a_file_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"y\.gguf: tokenizer\.ggml\.model must be a string"):
        Tokenizer.from_gguf({"general.architecture": "llama"}, str(tmp_path / "y.gguf"))
