"""Logits of llama.cpp's formats on the same tokens, compared with its bfloat16; some are kept."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

from peers.llama_library import Array, Model, load_backend
from peers.quality import as_json, compare

BACKEND = "haswell"
"""One that every machine of today loads: the figures are to be the same everywhere."""


def read_windows(path: str, windows: list[list[int]]) -> list[Array]:
    """The logits at every token of each window."""
    threads, length = len(os.sched_getaffinity(0)), max(map(len, windows))
    model = Model(path, threads, rows=1, length=length, kv_type="f16")
    results = []
    for window in windows:
        model.clear()
        entries = [(token, position, 0, True) for position, token in enumerate(window)]
        results.append(np.stack(model.feed(entries, np.copy)))
    return results


def main() -> None:
    """Write the figures of every format."""
    job = json.loads(sys.argv[1])
    windows = json.loads(Path(job["windows"]).read_text())
    load_backend(BACKEND)
    models = dict(job["models"])
    reference = read_windows(models.pop("bf16"), windows)
    figures = {}
    for name, path in models.items():
        logits = read_windows(path, windows)
        figures[name] = compare(reference, logits, windows)
        np.save(Path(job["logits"]) / f"{name}.npy", np.stack(logits[: job["kept"]]))
    Path(job["target"]).write_text(as_json(figures))


if __name__ == "__main__":
    main()
