"""llama.cpp through its C interface: one of its processor back ends chosen, models and contexts.

The package is built with one library per instruction set (see ``environments.py``). Which one is
loaded decides what the program uses; this is the same as a build for that instruction set alone.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

llama: Any = importlib.import_module("llama_cpp")

KV_TYPES = {"f16": 1, "q8_0": 8}
"""Numbers of ``ggml_type``."""
BATCH, MICRO_BATCH = 2048, 512
"""Tokens handed over, and computed, at once: the defaults of llama.cpp's own programs."""

Array = np.ndarray[Any, Any]
Value = TypeVar("Value")


def load_backend(name: str) -> None:
    """Use ``libggml-cpu-NAME.so`` and nothing else. Raises if the processor lacks its features."""
    libraries = Path(llama.__file__).parent / "lib"
    # Under the name that libllama asks for: the wheel holds copies, and each has its own registry.
    ggml = ctypes.CDLL(str(libraries / "libggml.so.0"))
    ggml.ggml_backend_load.restype = ctypes.c_void_p
    path = libraries / f"libggml-cpu-{name}.so"
    if not ggml.ggml_backend_load(str(path).encode()):
        raise RuntimeError(f"{path.name} does not load on this processor")
    llama.llama_backend_init()


def quantize(source: str, target: str, file_type: int, threads: int) -> None:
    """Write ``source`` in another of llama.cpp's formats."""
    parameters = llama.llama_model_quantize_default_params()
    parameters.ftype, parameters.nthread = file_type, threads
    if llama.llama_model_quantize(source.encode(), target.encode(), ctypes.byref(parameters)):
        raise RuntimeError(f"llama.cpp could not write {target}")


class Model:
    """A model and a context of so many tokens for each of so many sequences."""

    def __init__(self, path: str, threads: int, rows: int, length: int, kv_type: str) -> None:
        self._model = llama.llama_model_load_from_file(
            path.encode(), llama.llama_model_default_params()
        )
        if not self._model:
            raise RuntimeError(f"llama.cpp could not load {path}")
        vocabulary = llama.llama_model_get_vocab(self._model)
        self.vocab_size = int(llama.llama_vocab_n_tokens(vocabulary))
        parameters = llama.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = rows * length, rows
        parameters.n_batch, parameters.n_ubatch = BATCH, MICRO_BATCH
        parameters.n_threads = parameters.n_threads_batch = threads
        parameters.type_k = parameters.type_v = KV_TYPES[kv_type]
        parameters.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        parameters.no_perf = True
        self._context = llama.llama_init_from_model(self._model, parameters)
        if not self._context:
            raise RuntimeError("llama.cpp could not make a context")
        self._batch = llama.llama_batch_init(BATCH, 0, 1)

    def clear(self) -> None:
        """Forget all sequences."""
        llama.llama_memory_clear(llama.llama_get_memory(self._context), False)

    def feed(
        self, entries: Sequence[tuple[int, int, int, bool]], take: Callable[[Array], Value]
    ) -> list[Value]:
        """Run tokens (id, position, sequence, whether logits are wanted); what is taken of those.

        The logits that ``take`` sees are llama.cpp's own, which its next step writes over.
        """
        results = []
        for start in range(0, len(entries), BATCH):
            part, batch = entries[start : start + BATCH], self._batch
            batch.n_tokens = len(part)
            for i, (token, position, sequence, wanted) in enumerate(part):
                batch.token[i], batch.pos[i], batch.logits[i] = token, position, wanted
                batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            if llama.llama_decode(self._context, batch):
                raise RuntimeError("llama_decode failed")
            for i, entry in enumerate(part):
                if entry[3]:
                    pointer = llama.llama_get_logits_ith(self._context, i)
                    results.append(take(np.ctypeslib.as_array(pointer, (self.vocab_size,))))
        return results
