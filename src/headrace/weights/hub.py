"""From what a user calls a model to a directory on disk."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from headrace.errors import CheckpointError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?", re.ASCII)
GGUF = ".gguf"
_LATER_PIECE = re.compile(r".+-(?!00001)\d{5}-of-\d{5}\.gguf")
COMPANION_FILES = [
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "merges.txt",
    "vocab.txt",
]
"""What belongs to a checkpoint beside its weights."""
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHER_LAYOUTS = ["consolidated*", "original/*", "onnx/*"]


def is_gguf(path: Path) -> bool:
    """Whether a path is that of a GGUF file, by its name."""
    return path.suffix.lower() == GGUF


def resolve_model(
    model: str,
    revision: str | None = None,
    download_dir: str | None = None,
    *,
    weights: bool = True,
    endpoint: str | None = None,
) -> Path:
    """The directory of a checkpoint, or a GGUF file, downloaded when it is not a local one.

    Args:
        model: a directory, a GGUF file, or a hub id such as ``org/name``. ``org/name:Q4_K_M`` is
            the GGUF file there in whose name that stands.
        revision: branch, tag or commit of a hub id.
        download_dir, endpoint: cache directory and URL; huggingface_hub's own if ``None``.
        weights: ``False`` asks only for what a tokenizer needs.

    Raises:
        CheckpointError: there is no such checkpoint, or it cannot be had; says what to do.
    """
    local = os.path.expanduser(model)
    if os.path.isdir(local):
        return _checked(Path(local), model) if weights else Path(local)
    if os.path.exists(local):
        return _checked_file(Path(local), model)
    if not _HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"{model!r} is neither an existing directory nor a hub id; give a directory with "
            "config.json and *.safetensors, a GGUF file, or an id such as org/name or "
            "org/name:Q4_K_M"
        )
    repository, _, chosen = model.partition(":")
    patterns = [*COMPANION_FILES, "*.safetensors"] if weights else COMPANION_FILES
    if chosen:
        patterns = [f"*{chosen}*{GGUF}"]
    from huggingface_hub import snapshot_download

    try:
        path = snapshot_download(
            repository,
            revision=revision,
            cache_dir=download_dir,
            allow_patterns=patterns,
            ignore_patterns=_OTHER_LAYOUTS,
            endpoint=endpoint,
        )
    except Exception as error:  # the network stack below raises errors of several packages
        reason = _reason(error, repository, revision, download_dir)
        raise CheckpointError(
            f"{model} is not a directory, and it cannot be downloaded: {reason}"
        ) from error
    if chosen:
        return _chosen_file(Path(path), model, chosen)
    return _checked(Path(path), model) if weights else Path(path)


def _checked_file(path: Path, model: str) -> Path:
    """The file, if it can be a model."""
    if is_gguf(path):
        return path
    if path.suffix in _PICKLES:
        raise CheckpointError(
            f"{model} is a pickle file, which can run any code when it is read; convert it to "
            "safetensors with transformers' save_pretrained(), and give the directory"
        )
    raise CheckpointError(f"{model} is a file; give the directory that holds it, or a GGUF file")


def _chosen_file(directory: Path, model: str, chosen: str) -> Path:
    """The one GGUF file in whose name ``chosen`` stands, or the first of its pieces."""
    found = sorted(
        p for p in directory.rglob(f"*{chosen}*{GGUF}") if not _LATER_PIECE.match(p.name)
    )
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "none"
        raise CheckpointError(
            f"{model}: one GGUF file must have {chosen!r} in its name, and found: {names}"
        )
    return found[0]


def _checked(directory: Path, model: str) -> Path:
    """The directory, if it can be a checkpoint."""
    missing = [p for p in ("config.json", "*.safetensors") if not any(directory.glob(p))]
    files = sorted(path.name for path in directory.glob(f"*{GGUF}"))
    if missing and files:
        raise CheckpointError(
            f"{model}: {directory} holds GGUF files; give the path of one: {', '.join(files)}"
        )
    pickles = sorted(path.name for path in directory.iterdir() if path.suffix in _PICKLES)
    if "*.safetensors" in missing and pickles:
        raise CheckpointError(
            f"{model}: {directory} has pickle files ({', '.join(pickles)}), which can run any code "
            "when they are read, and no *.safetensors; convert it with transformers' "
            "save_pretrained()"
        )
    if missing:
        raise CheckpointError(
            f"{model} is not a checkpoint that Headrace reads: {directory} has no "
            f"{' and no '.join(missing)}; weights in another format can be saved anew with "
            "transformers' save_pretrained(), and a GGUF file there is named as org/name:Q4_K_M"
        )
    return directory


def _reason(error: Exception, model: str, revision: str | None, download_dir: str | None) -> str:
    """What went wrong and what to do about it."""
    from huggingface_hub import constants, errors

    cache = download_dir or constants.HF_HUB_CACHE
    page = f"{constants.ENDPOINT}/{model}"
    if isinstance(error, errors.GatedRepoError):
        return f"it is gated; ask for access at {page} and log in with `hf auth login`"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such model; check its name, or `hf auth login` if it is private"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision!r}; its branches and tags are listed at {page}"
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"the hub cannot be reached and {cache} does not hold all of it; "
            "connect to the network, or give the directory of a copy"
        )
    number = error.errno if isinstance(error, OSError) else None
    if number in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk of {cache} is full; make room or set download_dir to another disk"
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return f"{cache} cannot be written to ({error}); set download_dir to a directory that can"
    text = " ".join(str(error).split()) or type(error).__name__
    return f"{text}; try again, or give the directory of a copy"
