"""The extension module of csrc/. Tensors are addresses, strides count elements."""

from collections.abc import Sequence

def known_isas() -> list[str]: ...
def supported_isas() -> list[str]: ...

class LinearWeight:
    @staticmethod
    def blocks(
        *,
        panels: int,
        rows: int,
        columns: int,
        padded_columns: int,
        group: int,
        gated: bool,
        bits: tuple[int, int],
        planes: tuple[int, int],
        table: int,
        zero: int,
        super: int,
        wide_factors: bool,
        factors: int,
        steps: int,
        low_factors: int,
        low_steps: int,
        zeros: int,
        bias: int,
    ) -> LinearWeight: ...
    def __init__(
        self,
        format: str,
        panels: int,
        rows: int,
        columns: int,
        padded_columns: int,
        group: int,
        gated: bool,
        values: int,
        scales: int,
        zeros: int,
        bias: int,
    ) -> None: ...

class NeuronWeight:
    def __init__(
        self, neurons: int, hidden: int, values: int, scales: int, inner_bias: int
    ) -> None: ...

class LayerCache:
    def __init__(
        self,
        pages: int,
        page_bytes: int,
        block_size: int,
        width: int,
        keys: Sequence[int],
        values: Sequence[int],
        key_scales: Sequence[int],
        value_scales: Sequence[int],
    ) -> None: ...

class StepRows:
    def __init__(
        self,
        rows: int,
        groups: int,
        pages: int,
        kv_heads: int,
        block_size: int,
        lengths: int,
        past: int,
        tables: int,
        head_group: int,
    ) -> None: ...
    @property
    def tokens(self) -> int: ...

class CodedLines:
    def __init__(
        self,
        bits: int,
        lines: int,
        length: int,
        groups: int,
        rank: int,
        kept: int,
        places: Sequence[tuple[int, int]],
    ) -> None: ...

class CodedLayer:
    def __init__(
        self, heads: int, slots: int, width: int, keys: CodedLines, values: CodedLines
    ) -> None: ...
    @property
    def width(self) -> int: ...

class CodedRows:
    def __init__(
        self, rows: int, unit_pages: int, starts: int, queries: int, units: int, table: int
    ) -> None: ...

class Context:
    def __init__(self, threads: int, isa: str = "auto") -> None: ...
    @property
    def isa(self) -> str: ...
    @property
    def threads(self) -> int: ...
    def linear(
        self,
        weight: LinearWeight,
        x: int,
        x_stride: int,
        rows: int,
        norm: int,
        epsilon: float,
        residual: int,
        residual_stride: int,
        out: int,
        out_stride: int,
        out_is_float: bool,
        /,
    ) -> None: ...
    def multiply_chosen(
        self,
        weight: NeuronWeight,
        bias: int,
        x: int,
        x_stride: int,
        rows: int,
        chosen: int,
        most: int,
        norm: int,
        epsilon: float,
        residual: int,
        residual_stride: int,
        out: int,
        /,
    ) -> None: ...
    def in_halves(self, weight: LinearWeight, rows: int, /) -> bool: ...
    def rows_of(self, weight: LinearWeight, ids: int, count: int, out: int, /) -> None: ...
    def rms_norm(
        self,
        x: int,
        stride: int,
        rows: int,
        width: int,
        weight: int,
        epsilon: float,
        out: int,
        /,
    ) -> None: ...
    def pack_bf16(
        self,
        source: int,
        rows: int,
        columns: int,
        padded_columns: int,
        gated: bool,
        target: int,
        /,
    ) -> None: ...
    def search_scales(
        self,
        weights: int,
        groups: int,
        size: int,
        ends: Sequence[float],
        lowest: int,
        highest: int,
        zero: int,
        round_scales: bool,
        values: int,
        scales: int,
        zeros: int,
        /,
    ) -> None: ...
    def attend(
        self,
        cache: LayerCache,
        step: StepRows,
        heads: int,
        q: int,
        q_stride: int,
        q_head_stride: int,
        k: int,
        k_stride: int,
        k_head_stride: int,
        v: int,
        v_stride: int,
        v_head_stride: int,
        cos: int,
        sin: int,
        scale: float,
        softcap: float,
        window: int,
        causal: bool,
        out: int,
        lse: int,
        sums: int,
        sums_stride: int,
        /,
    ) -> None: ...
    def attend_coded(
        self,
        layer: CodedLayer,
        rows: CodedRows,
        pages: int,
        page_bytes: int,
        heads: int,
        q: int,
        q_stride: int,
        q_head_stride: int,
        cos: int,
        sin: int,
        scale: float,
        softcap: float,
        out: int,
        lse: int,
        /,
    ) -> None: ...
    def highest(self, scores: int, rows: int, width: int, values: int, places: int) -> None: ...
    def lowest_kept(
        self, scores: int, measures: int, rows: int, width: int, wanted: int, lowest: int, /
    ) -> None: ...
    def read(self, data: int, size: int, /) -> int: ...
    def peak(self, kind: str, steps: int, /) -> float: ...
