"""Which programs are compared, in which forms, and on what."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Program:
    """One program in one form.

    Args:
        driver: ``run_DRIVER.py``, and the environment it runs in.
        form: which of the model's files it reads; see ``models.py``.
        settings: handed to the driver.
        bits: of a weight: 16, 8 or 4, in round numbers.
        isa: the instruction set it is held to.
        kv_item_bytes: of the KV cache, scales included, where the driver does not say.
    """

    driver: str
    form: str
    settings: dict[str, Any] = field(default_factory=dict)
    bits: int = 4
    isa: str = "auto"
    kv_item_bytes: float = 2.0

    def with_settings(self, **settings: Any) -> Program:
        """The same with further settings."""
        return replace(self, settings={**self.settings, **settings})


Q8_0_BYTES = 34 / 32
"""llama.cpp's q8_0: 32 weights of a byte, and a half-precision scale."""
U8_BYTES = 1 + 8 / 64
"""OpenVINO's cache: a byte, and a scale and a zero point per token and head of 64."""
BACKENDS = {
    "auto": ("sapphirerapids", "zen4", "cooperlake", "icelake", "cascadelake", "haswell"),
    "avx2": ("haswell",),
    "avx512_vnni": ("zen4", "icelake", "cascadelake"),
}
"""Instruction set -> llama.cpp's libraries for it, the best first."""


def _llama(kind: str, bits: int = 4, isa: str = "auto") -> Program:
    return Program("llama_cpp", f"gguf-{kind}", bits=bits, isa=isa)


def _openvino(kind: str, bits: int) -> Program:
    return Program("openvino", f"openvino-{kind}", bits=bits, kv_item_bytes=U8_BYTES)


def _headrace(isa: str = "auto", **options: str) -> Program:
    settings = options if isa == "auto" else {**options, "isa": isa}
    return Program("headrace", "headrace-w4a8", settings, isa=isa)


PROGRAMS = {
    "headrace bf16": Program("headrace", "bf16", {"dtype": "bfloat16"}, bits=16),
    "headrace w8a8": Program("headrace", "bf16", {"weights": "w8a8"}, bits=8),
    "headrace w4a8": _headrace(),
    "headrace w4a8, int8 KV": _headrace(kv_cache_dtype="int8"),
    "transformers bf16": Program("transformers", "bf16", bits=16),
    "vLLM bf16": Program("vllm_cpu", "bf16", bits=16),
    "vLLM int8": Program("vllm_cpu", "vllm-int8", bits=8),
    "vLLM int4": Program("vllm_cpu", "vllm-int4"),
    "OpenVINO int8": _openvino("int8", 8),
    "OpenVINO int4": _openvino("int4", 4),
    "llama.cpp bf16": _llama("bf16", 16),
    "llama.cpp q8_0": _llama("q8_0", 8),
    "llama.cpp q4_0": _llama("q4_0"),
    "llama.cpp q4_K_M": _llama("q4_k_m"),
    "llama.cpp q4_K_M, q8_0 KV": replace(
        _llama("q4_k_m").with_settings(kv_type="q8_0"), kv_item_bytes=Q8_0_BYTES
    ),
    **{
        f"{name} {isa}": program
        for isa in ("avx2", "avx512_vnni")
        for name, program in (
            ("headrace w4a8", _headrace(isa)),
            ("llama.cpp q4_0", _llama("q4_0", isa=isa)),
            ("llama.cpp q4_K_M", _llama("q4_k_m", isa=isa)),
        )
    },
}
"""Name in the tables -> program."""

ON_REQUEST = (
    *("transformers bf16", "OpenVINO int8", "llama.cpp bf16", "llama.cpp q8_0"),
    "llama.cpp q4_K_M, q8_0 KV",
)
"""Not measured unless they are named: another form of the same program is faster."""

_UNFORCED = tuple(
    name for name, program in PROGRAMS.items() if program.isa == "auto" and "KV" not in name
)
# The slow ones take minutes where there is much to read; there the best of each peer stand for it.
_BATCH = tuple(name for name in _UNFORCED if name not in ("transformers bf16", "llama.cpp bf16"))
_START = (
    *("headrace bf16", "headrace w4a8", "transformers bf16"),
    *("vLLM bf16", "OpenVINO int4", "llama.cpp q4_K_M"),
)
_READING = (
    *("headrace bf16", "headrace w8a8", "headrace w4a8"),
    *("vLLM bf16", "vLLM int8", "OpenVINO int8", "llama.cpp q8_0"),
)
_LONG = (
    "headrace w4a8",
    "headrace w4a8, int8 KV",
    "vLLM bf16",
    "OpenVINO int4",
    "llama.cpp q4_K_M",
    "llama.cpp q4_K_M, q8_0 KV",
)


def _forced(isa: str) -> tuple[str, ...]:
    return tuple(name for name, program in PROGRAMS.items() if program.isa == isa)


COMPARISONS: dict[str, tuple[str, tuple[str, ...]]] = {
    "decode": ("decode", _UNFORCED),
    "prefill-512": ("prefill-512", _UNFORCED),
    "batch": ("batch", _BATCH),
    "prefill-4096": ("prefill-4096", _READING),
    "decode-8192": ("decode-8192", _LONG),
    "start": ("start", _START),
    **{
        f"{workload}-{isa}": (workload, _forced(isa))
        for isa in ("avx2", "avx512_vnni")
        for workload in ("decode", "prefill-512")
    },
}
"""Name -> workload and programs."""

SITTINGS = (
    ("decode", "prefill-512", "batch"),
    ("prefill-4096", "decode-8192"),
    ("start",),
    ("decode-avx2", "prefill-512-avx2"),
    ("decode-avx512_vnni", "prefill-512-avx512_vnni"),
)
"""Comparisons that one process of each program measures, one after the other."""
