"""The engine's configuration: one frozen level, every field documented."""

from __future__ import annotations

from dataclasses import dataclass

from headrace.errors import ConfigurationError

FULL = "full"
"""Everything stays in the KV cache."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """Everything the engine can be told. Names follow vLLM's where it has one.

    Args:
        model: directory, GGUF file, hub id, or ``None`` for the embedded model.
        tokenizer: directory, GGUF file or hub id of another tokenizer; the model's own by default.
        revision: branch, tag or commit of a hub id.
        download_dir: where hub files are cached; huggingface_hub's default if ``None``.
        device: "auto", "cpu", "cuda" or "cuda:N".
        dtype: "auto" (the checkpoint's, or what the device computes fast), "float32",
            "bfloat16" or "float16".
        weights: format of the linear weights: "auto" (as the checkpoint has them), "bf16", "w8a8",
            or "w4a8" with a group ("w4a8-g32", "-g64", "-g128") and zero points ("-zp") if wanted;
            plain weights are quantized while they load.
        head_weights: format of the output head, and of an embedding tied to it; "auto" is "w8a8"
            where ``weights`` are quantized, else the same.
        reference: fp32, one token at a time: results do not depend on what shares the batch.
        max_model_len: context limit in tokens; the model's own, cut to the memory, if ``None``.
        max_num_seqs: sequences in one step at most.
        max_num_batched_tokens: inputs in one step at most; the device's default if ``None``.
        max_num_waiting: length of the queue; more requests are refused.
        block_size: slots of a KV page.
        kv_cache_dtype: "auto" (the dtype of computation) or "int8" (with a scale per token and
            head, half the bytes of bfloat16).
        kv: the method that decides what stays in the KV cache, with its options
            ("NAME:OPTION=VALUE,..."), or "full".
        methods: others that are on, each with its options ("NAME:OPTION=VALUE,..."; NAME may be
            "FILE.py:CLASS"). Requests may choose among them.
        kv_cache_memory_bytes: size of the KV arena; overrides ``memory_utilization``.
        memory_utilization: share of the memory that is free after loading the weights.
        enable_prefix_caching: keep and share the pages of equal prefixes; ``None`` where the model
            allows it.
        scheduling_policy: "fcfs" or "priority".
        seed: base of the seeds of requests that name none; drawn at random if ``None``.
        num_threads: threads of tensor operations; all cores the process may use if ``None``.
        isa: instruction set of the native CPU kernels: "auto", "avx2", "avx512_vnni", ... or
            "torch" for torch's own operations.
    """

    model: str | None = None
    tokenizer: str | None = None
    revision: str | None = None
    download_dir: str | None = None
    device: str = "auto"
    dtype: str = "auto"
    weights: str = "auto"
    head_weights: str = "auto"
    reference: bool = False
    max_model_len: int | None = None
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    max_num_waiting: int = 1024
    block_size: int = 16
    kv_cache_dtype: str = "auto"
    kv: str = FULL
    methods: tuple[str, ...] = ()
    kv_cache_memory_bytes: int | None = None
    memory_utilization: float = 0.5
    enable_prefix_caching: bool | None = None
    scheduling_policy: str = "fcfs"
    seed: int | None = None
    num_threads: int | None = None
    isa: str = "auto"

    def __post_init__(self) -> None:
        positive = ("max_num_seqs", "block_size", "max_num_waiting")
        optional = (
            "max_model_len",
            "max_num_batched_tokens",
            "kv_cache_memory_bytes",
            "num_threads",
        )
        for name in (*positive, *optional):
            value = getattr(self, name)
            whole = isinstance(value, int) and not isinstance(value, bool) and value >= 1
            ok = whole or (value is None and name in optional)
            self._check(name, ok, "must be an integer of at least 1")
        self._check("reference", isinstance(self.reference, bool), "must be true or false")
        ok = self.enable_prefix_caching is None or isinstance(self.enable_prefix_caching, bool)
        self._check("enable_prefix_caching", ok, "must be true, false or None")
        for name in ("device", "weights", "head_weights", "scheduling_policy", "isa", "kv"):
            self._check(name, isinstance(getattr(self, name), str), "must be a name")
        self._check("seed", self.seed is None or isinstance(self.seed, int), "must be an integer")
        ok = not isinstance(self.methods, str) and all(isinstance(m, str) for m in self.methods)
        self._check("methods", ok, "must be a list of texts")
        share = self.memory_utilization
        ok = isinstance(share, (int, float)) and 0 < share <= 1
        self._check("memory_utilization", ok, "must be in (0, 1]")
        dtypes = ("auto", "float32", "bfloat16", "float16")
        self._check("dtype", self.dtype in dtypes, f"must be one of {', '.join(dtypes)}")
        kinds = ("auto", "int8")
        self._check(
            "kv_cache_dtype", self.kv_cache_dtype in kinds, f"must be one of {', '.join(kinds)}"
        )
        if self.reference:
            ok = self.dtype in ("auto", "float32")
            self._check("dtype", ok, "reference mode computes in float32")

    def cache_dtype(self, compute_dtype: str) -> str:
        """The element type of the KV cache of a model that computes in ``compute_dtype``."""
        return compute_dtype if self.kv_cache_dtype == "auto" else self.kv_cache_dtype

    def _check(self, field: str, ok: bool, message: str) -> None:
        if not ok:
            raise ConfigurationError(f"{field}: {message}, got {getattr(self, field)!r}")
