"""What transformers' tokenizer classes make of a SentencePiece model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, normalizers

from headrace.errors import CheckpointError
from headrace.text.vocabularies.added_tokens import (
    described_tokens,
    misplaced,
    put_around,
    read_added_tokens,
)
from headrace.text.vocabularies.sentence_piece import (
    Piece,
    PieceType,
    SentencePieceModel,
    build_sentence_piece,
)
from headrace.text.vocabularies.sentence_piece_file import read_sentence_piece
from headrace.text.vocabularies.settings import Settings

_FAIRSEQ = ("<s>", "<pad>", "</s>", "<unk>")
"""The first tokens of models trained with fairseq, whatever the pieces begin with."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """How a class uses a model.

    Args:
        model: its pieces at their token ids.
        names: texts of the named tokens.
        before, after: named tokens that are put around a text, or ``None``.
        preparation: what is done to a text before all else.
    """

    model: SentencePieceModel
    names: Mapping[str, str]
    before: str | None = None
    after: str | None = None
    preparation: Sequence[normalizers.Normalizer] = ()


def load_sentence_piece(
    path: Path, settings: Settings
) -> tuple[tokenizers.Tokenizer, dict[str, str]]:
    """The tokenizer of a SentencePiece model with the settings beside it, and its named tokens.

    Raises:
        CheckpointError: a file is damaged, or the class's way with such models is not known.
    """
    model, kind = read_sentence_piece(path), settings.tokenizer_class
    if model.unigram and kind not in (*_PLANS, *_PLAIN_UNIGRAM):
        raise CheckpointError(
            f"{path}: what tokenizer_class {kind!r} makes of a unigram model is not known; known "
            f"are {', '.join(sorted(_PLANS))}; convert it once with transformers: "
            f"AutoTokenizer.from_pretrained({str(path.parent)!r}).save_pretrained(...)"
        )
    plan = _PLANS.get(kind, _plain)(model, settings)
    names = settings.names(plan.names)
    added = read_added_tokens(settings.directory, settings.values)
    known = {token.content: token for token in described_tokens(settings.values)}
    known |= {token.content: token for token in added.values()}
    model = replace(
        plan.model,
        pieces=_with_added(plan.model.pieces, added, path),
        add_dummy_prefix=settings.flag("add_prefix_space", plan.model.add_dummy_prefix),
    )
    try:
        tokenizer = build_sentence_piece(
            model,
            known,
            prefix_once=not settings.flag("legacy", True),
            preparation=plan.preparation,
        )
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged: {error}; download it again") from error
    before, after = (name and names.get(name) for name in (plan.before, plan.after))
    put_around(tokenizer, before, after, path)
    return tokenizer, names


def _plain(model: SentencePieceModel, settings: Settings) -> _Plan:
    """As Llama and Gemma: the model as it is, and flags for what is put around a text."""
    begins, ends = settings.flag("add_bos_token", True), settings.flag("add_eos_token", False)
    return _Plan(
        model,
        model.names,
        before="bos_token" if begins else None,
        after="eos_token" if ends else None,
    )


def _t5(model: SentencePieceModel, settings: Settings) -> _Plan:
    """As T5: sentinels after the pieces, counting down, and an end of sequence."""
    count = settings.values.get("extra_ids", 100)
    listed = settings.values.get("added_tokens_decoder") is not None
    sentinels = range(0 if listed or not isinstance(count, int) else count)
    extra = [Piece(f"<extra_id_{i}>", type=PieceType.CONTROL) for i in reversed(sentinels)]
    names = {"eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>"}
    return _Plan(replace(model, pieces=[*model.pieces, *extra]), names, after="eos_token")


def _xlm_roberta(model: SentencePieceModel, settings: Settings) -> _Plan:
    """As XLM-RoBERTa: fairseq's tokens in place of the first three pieces, a mask at last."""
    first = [Piece(text, type=PieceType.CONTROL) for text in _FAIRSEQ[:3]]
    unknown = Piece(_FAIRSEQ[3], type=PieceType.UNKNOWN)
    mask = Piece("<mask>", type=PieceType.CONTROL)
    names = {f"{name}_token": f"<{name}>" for name in ("unk", "pad", "mask")}
    names |= {f"{name}_token": "<s>" for name in ("bos", "cls")}
    names |= {f"{name}_token": "</s>" for name in ("eos", "sep")}
    pieces = [*first, unknown, *model.pieces[3:], mask]
    return _Plan(replace(model, pieces=pieces), names, before="cls_token", after="sep_token")


def _albert(model: SentencePieceModel, settings: Settings) -> _Plan:
    """As ALBERT: quotes, accents and capitals are gone before pieces are found."""
    steps: list[normalizers.Normalizer] = [normalizers.Replace(q, '"') for q in ("``", "''")]
    if not settings.flag("keep_accents", False):
        steps += [normalizers.NFKD(), normalizers.StripAccents()]
    if settings.flag("do_lower_case", True):
        steps.append(normalizers.Lowercase())
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("cls", "sep", "mask")}
    names |= {"bos_token": "[CLS]", "eos_token": "[SEP]"}
    names |= {"unk_token": "<unk>", "pad_token": "<pad>"}
    # ALBERT cuts the comma off numbers; a score that no other piece has does so too.
    pieces = [
        p._replace(score=p.score - 100) if p.text[-2:-1].isdigit() and p.text[-1] == "," else p
        for p in model.pieces
    ]
    return _Plan(
        replace(model, pieces=pieces),
        names,
        before="cls_token",
        after="sep_token",
        preparation=steps,
    )


_PLANS: Mapping[str, Callable[[SentencePieceModel, Settings], _Plan]] = {
    "AlbertTokenizer": _albert,
    "T5Tokenizer": _t5,
    "XLMRobertaTokenizer": _xlm_roberta,
}
_PLAIN_UNIGRAM = ("", "LlamaTokenizer", "PreTrainedTokenizer", "TokenizersBackend")


def _with_added(
    pieces: Sequence[Piece], added: Mapping[int, AddedToken], path: Path
) -> list[Piece]:
    """The pieces with the added tokens at their ids, in place of others there.

    Raises:
        CheckpointError: a token has another id already.
    """
    ids = {piece.text: index for index, piece in enumerate(pieces)}
    result = list(pieces)
    for index, token in added.items():
        if ids.get(token.content, index) != index:
            raise misplaced(path, token.content, ids[token.content], index)
        result += _fillers(len(result), index + 1)
        if result[index].text != token.content:
            is_unknown = result[index].type is PieceType.UNKNOWN
            kind = PieceType.UNKNOWN if is_unknown else PieceType.CONTROL
            result[index] = Piece(token.content, type=kind)
    return result


def _fillers(start: int, end: int) -> Iterator[Piece]:
    """Pieces for token ids that nothing stands for."""
    return (Piece(f"[unused {index}]", type=PieceType.UNUSED) for index in range(start, end))
