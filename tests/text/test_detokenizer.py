"""Streams of text: the same text as decoding at once, as early as it is certain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders

from headrace.contracts.sampling import SamplingParams
from headrace.contracts.text import TextStream
from headrace.text.detokenizer import Detokenizer, TokenDecoder
from headrace.text.stop_strings import StopStrings
from headrace.text.tokenizer import Tokenizer
from tests.text import builders

BYTE_LEVEL = builders.byte_level()
SENTENCE_PIECE = builders.sentence_piece()
FIRST_BYTE = SENTENCE_PIECE.token_to_id("<0x00>")

any_ids = st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() + 3), max_size=40)
small_text = st.text("ab\u00e9", max_size=24)


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(builders.save(BYTE_LEVEL, tmp_path_factory.mktemp("byte_level")))


@pytest.fixture(scope="module")
def sentence_piece(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(builders.save(SENTENCE_PIECE, tmp_path_factory.mktemp("sentence_piece")))


def open_stream(tokenizer: Tokenizer, **options: Any) -> TextStream:
    stream = tokenizer.stream(SamplingParams(**options))
    assert stream is not None
    return stream


def streamed(tokenizer: Tokenizer, ids: Sequence[int], **options: Any) -> str:
    stream = open_stream(tokenizer, **options)
    return "".join([stream.push(i) for i in ids] + [stream.finish()])


# Detokenizing


@given(ids=any_ids, skip=st.booleans())
def test_byte_level_stream_equals_decoding(
    byte_level: Tokenizer, ids: list[int], skip: bool
) -> None:
    expected = BYTE_LEVEL.decode(ids, skip_special_tokens=skip)
    assert streamed(byte_level, ids, skip_special_tokens=skip) == expected


@given(text=st.text(max_size=60))
def test_byte_level_characters_come_as_soon_as_they_are_complete(
    byte_level: Tokenizer, text: str
) -> None:
    ids = BYTE_LEVEL.encode(text.replace("\ufffd", "")).ids
    stream, released = open_stream(byte_level), ""
    for count, token in enumerate(ids, start=1):
        released += stream.push(token)
        assert released == BYTE_LEVEL.decode(ids[:count]).rstrip("\ufffd")
    assert stream.finish() == ""
    assert released == text.replace("\ufffd", "")


whole_pieces = st.integers(0, 2) | st.integers(259, SENTENCE_PIECE.get_vocab_size() + 3)
bytes_of_a_character = st.characters(codec="utf-8").map(
    lambda character: [FIRST_BYTE + byte for byte in character.encode()]
)
sentence_piece_ids = st.lists(
    whole_pieces.map(lambda token: [token]) | bytes_of_a_character, max_size=20
).map(lambda parts: [token for part in parts for token in part])


@given(ids=sentence_piece_ids, skip=st.booleans())
def test_sentence_piece_stream_continues_a_prompt_as_decoding_does(
    sentence_piece: Tokenizer, ids: list[int], skip: bool
) -> None:
    prompt = SENTENCE_PIECE.encode("the water").ids
    whole = SENTENCE_PIECE.decode([*prompt, *ids], skip_special_tokens=skip)
    before = SENTENCE_PIECE.decode(prompt, skip_special_tokens=skip)
    assert before + streamed(sentence_piece, ids, skip_special_tokens=skip) == whole


@given(ids=st.lists(st.integers(0, SENTENCE_PIECE.get_vocab_size() + 3), max_size=40))
def test_sentence_piece_stream_is_the_text_of_the_bytes(
    sentence_piece: Tokenizer, ids: list[int]
) -> None:
    data = b"".join(map(sentence_piece.token_bytes, ids))
    expected = data.decode("utf-8", "replace")
    assert streamed(sentence_piece, ids, skip_special_tokens=False) == expected


def test_malformed_bytes_leave_their_neighbours_whole(sentence_piece: Tokenizer) -> None:
    """Decoding at once replaces the whole run of bytes, characters that were released included."""
    ids = [FIRST_BYTE + byte for byte in "水".encode() + b"\xff" + "渠".encode() + b"\xf0\x9f"]
    assert SENTENCE_PIECE.decode(ids[:4]) == "\ufffd" * 4
    assert streamed(sentence_piece, ids) == "水\ufffd渠\ufffd"
    assert streamed(sentence_piece, ids[:5]) == "水\ufffd\ufffd"


def test_characters_of_a_run_of_bytes_do_not_wait_for_its_end(sentence_piece: Tokenizer) -> None:
    stream = open_stream(sentence_piece)
    ids = [FIRST_BYTE + byte for byte in "水渠".encode()]
    assert [stream.push(token) for token in ids] == ["", "", "水", "", "", "渠"]


@pytest.mark.parametrize(
    "decoder",
    [
        None,
        decoders.WordPiece(),
        decoders.BPEDecoder(),
        decoders.Sequence([decoders.Fuse(), decoders.Replace("wh", "h")]),
    ],
    ids=["none", "word piece", "bpe", "sequence"],
)
@given(data=st.data())
def test_other_decoders_stream_by_difference(
    tmp_path_factory: pytest.TempPathFactory, decoder: Any, data: st.DataObject
) -> None:
    tokenizer = builders.words(decoder)
    ours = Tokenizer(builders.save(tokenizer, tmp_path_factory.mktemp("words")))
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=12))
    skip = data.draw(st.booleans())
    expected = tokenizer.decode(ids, skip_special_tokens=skip)
    assert streamed(ours, ids, skip_special_tokens=skip) == expected


def test_metaspace_stream_keeps_the_space_of_a_continuation(tmp_path: Path) -> None:
    tokenizer = builders.words(decoders.Metaspace())
    ours = Tokenizer(builders.save(tokenizer, tmp_path))
    ids = [tokenizer.token_to_id(piece) for piece in ("▁the", "▁wheel", "run")]
    assert tokenizer.decode(ids) == "the wheelrun"
    assert streamed(ours, ids) == " the wheelrun"


def test_a_window_of_malformed_text_stays_bounded(tmp_path: Path) -> None:
    decoder = decoders.Sequence([decoders.Strip("x", 0, 1), decoders.ByteFallback()])
    tokenizer = builders.sentence_piece()
    tokenizer.decoder = decoder
    stream = open_stream(Tokenizer(builders.save(tokenizer, tmp_path)))
    pieces = [stream.push(FIRST_BYTE + 0xFF) for _ in range(100)]
    assert max(map(len, pieces)) <= 16
    assert "".join([*pieces, stream.finish()]) == "\ufffd" * 100


def test_no_stream_without_text(byte_level: Tokenizer) -> None:
    assert byte_level.stream(SamplingParams(detokenize=False)) is None


# Stop strings


class PieceDecoder(TokenDecoder):
    """Token ``i`` is the ``i``-th piece."""

    def __init__(self, pieces: Sequence[str]) -> None:
        self._pieces = pieces

    def push(self, token_id: int) -> str:
        return self._pieces[token_id]

    def flush(self) -> str:
        return ""


def run_pieces(
    pieces: Sequence[str], stops: Sequence[str], include: bool = False
) -> tuple[list[str], TextStream]:
    """What each piece, and then the end, released."""
    stream = Detokenizer(PieceDecoder(pieces), StopStrings(stops), include)
    return [stream.push(i) for i in range(len(pieces))] + [stream.finish()], stream


def first_stop(text: str, stops: Sequence[str]) -> tuple[int, str] | None:
    """Where the stop string ends that ends first, and the longest that ends there."""
    for end in range(1, len(text) + 1):
        met = [stop for stop in stops if text.endswith(stop, 0, end)]
        if met:
            return end, max(met, key=len)
    return None


pieces_lists = st.lists(small_text, max_size=12)
stop_lists = st.lists(st.text("ab\u00e9", min_size=1, max_size=5), min_size=1, max_size=6)


@given(pieces=pieces_lists, stop=st.text("ab", min_size=1, max_size=4))
def test_text_ends_before_the_stop_string(pieces: list[str], stop: str) -> None:
    before, met, _ = "".join(pieces).partition(stop)
    released, stream = run_pieces(pieces, [stop])
    assert "".join(released) == before
    assert stream.stopped_by == (met or None)
    released, _ = run_pieces(pieces, [stop], include=True)
    assert "".join(released) == before + met


@given(pieces=pieces_lists, stops=stop_lists)
def test_of_several_the_first_that_ends_counts(pieces: list[str], stops: list[str]) -> None:
    text = "".join(pieces)
    expected = first_stop(text, stops)
    released, stream = run_pieces(pieces, stops)
    if expected is None:
        assert stream.stopped_by is None
        assert "".join(released) == text
    else:
        end, stop = expected
        assert stream.stopped_by == stop
        assert "".join(released) == text[: end - len(stop)]


@given(pieces=pieces_lists, stops=stop_lists)
def test_only_what_could_begin_a_stop_string_is_held_back(
    pieces: list[str], stops: list[str]
) -> None:
    prefixes = tuple(stop[:length] for stop in stops for length in range(1, len(stop)))
    released, _ = run_pieces(pieces, stops)
    for count in range(1, len(pieces) + 1):
        text = "".join(pieces[:count])
        if first_stop(text, stops) is not None:
            break
        held = max((len(prefix) for prefix in prefixes if text.endswith(prefix)), default=0)
        assert "".join(released[:count]) == text[: len(text) - held]


@given(
    text=st.text("ab\u00e9\u6c34", max_size=30), stop=st.text("ab\u6c34", min_size=1, max_size=3)
)
def test_stop_strings_with_a_real_tokenizer(byte_level: Tokenizer, text: str, stop: str) -> None:
    for ids in (byte_level.encode(text), [i for c in text for i in byte_level.encode(c)]):
        assert streamed(byte_level, ids, stop=stop) == text.partition(stop)[0]


def test_nothing_comes_after_a_stop_string() -> None:
    released, stream = run_pieces(["a", "xSTOPy", "b", "STOP", "c"], ["STOP"])
    assert released == ["a", "x", "", "", "", ""]
    assert stream.stopped_by == "STOP"


def test_a_stop_string_may_end_in_the_last_incomplete_character(byte_level: Tokenizer) -> None:
    first_half = [BYTE_LEVEL.encode("a").ids[0], BYTE_LEVEL.token_to_id("Ã")]
    stream = open_stream(byte_level, stop=["a\ufffd"])
    assert [stream.push(token) for token in first_half] == ["", ""]
    assert stream.finish() == ""
    assert stream.stopped_by == "a\ufffd"


def test_streams_of_one_request_are_independent(byte_level: Tokenizer) -> None:
    params = SamplingParams(stop=["ab"])
    first, second = byte_level.stream(params), byte_level.stream(params)
    assert first is not None and second is not None
    a, b = (byte_level.encode(letter)[0] for letter in "ab")
    assert (first.push(a), second.push(b), first.push(b)) == ("", "b", "")
    assert (first.stopped_by, second.stopped_by) == ("ab", None)


def test_the_most_and_longest_stop_strings_that_a_request_may_have() -> None:
    stops = [chr(0x100 + i) * 1023 + "!" for i in range(64)]
    pieces = [chr(0x100 + i) * 1023 for i in range(64)] + ["!", "x"]
    released, stream = run_pieces(pieces, stops)
    assert "".join(released) == "".join(pieces[:63])
    assert stream.stopped_by == stops[63]
