"""How a model's hidden states become embeddings of texts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from headrace.contracts.step import Pooling
from headrace.errors import CheckpointError, InvalidRequestError
from headrace.json_file import read_json, read_json_objects

Vector = npt.NDArray[np.float32]

_MODES: dict[str, Pooling] = {
    "pooling_mode_cls_token": "first",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_lasttoken": "last",
}


@dataclass(frozen=True, slots=True)
class EmbeddingSettings:
    """Which hidden states count, and whether embeddings have length 1."""

    pooling: Pooling
    normalized: bool = True

    def finish(self, pooled: Vector, dimensions: int | None = None) -> Vector:
        """The embedding ``[width]`` of a text; of its first ``dimensions`` elements if given.

        Matryoshka Representation Learning, section 3: prefixes of an embedding are embeddings.

        Raises:
            InvalidRequestError: there are fewer elements.
        """
        if dimensions is not None and not 1 <= dimensions <= len(pooled):
            raise InvalidRequestError(
                "dimensions", f"must be from 1 to {len(pooled)}, the width of the embeddings"
            )
        vector = pooled[:dimensions]
        if not self.normalized:
            return vector
        length = float(np.linalg.norm(vector))
        return vector / np.float32(length) if length else vector


def default_pooling(causal: bool) -> Pooling:
    """The last token of a decoder, which alone has seen the whole text; else the mean over all."""
    return "last" if causal else "mean"


def read_pooling(directory: Path, causal: bool) -> EmbeddingSettings:
    """What the files of sentence-transformers in a checkpoint say.

    Without them it is the default, and embeddings have length 1.

    Raises:
        CheckpointError: a way of pooling is not supported.
    """
    modules = read_json_objects(directory / "modules.json")
    default = default_pooling(causal)
    if not modules:
        return EmbeddingSettings(default)
    kinds = [str(module.get("type", "")).rpartition(".")[2] for module in modules]
    unknown = set(kinds) - {"Transformer", "Pooling", "Normalize"}
    if unknown:
        raise CheckpointError(
            f"{directory / 'modules.json'}: modules {', '.join(sorted(unknown))} are not supported"
        )
    normalized = "Normalize" in kinds
    if "Pooling" not in kinds:
        return EmbeddingSettings(default, normalized)
    folder = str(modules[kinds.index("Pooling")].get("path", "1_Pooling"))
    settings = read_json(directory / folder / "config.json", required=False)
    chosen = [mode for name, mode in _MODES.items() if settings.get(name)]
    others = [n for n, on in settings.items() if n.startswith("pooling_mode_") and on is True]
    if len(chosen) != 1 or len(others) != 1:
        raise CheckpointError(
            f"{directory / folder / 'config.json'}: pooling must be one of {', '.join(_MODES)}, "
            f"got {', '.join(others) or 'none'}"
        )
    return EmbeddingSettings(chosen[0], normalized)
