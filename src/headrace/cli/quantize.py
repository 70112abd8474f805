"""``headrace quantize``: pack a model's weights into a checkpoint that loads by memory map."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from headrace.cli.options import Json
from headrace.cli.output import progress, report, show_bytes
from headrace.config import EngineConfig

Format = typer.Option(
    "--format", help="Of the linear weights: bf16, w8a8, w4a8, w4a8-g64, w4a8-g64-zp, ..."
)
HeadFormat = typer.Option("--head-format", help="Of the output head.")
Output = typer.Option("--output", "-o", help="Directory to write.", show_default=False)
Force = typer.Option("--force", help="Replace the checkpoint in it.")
How = typer.Option("--quantizer", help="How values are chosen.")
Revision = typer.Option("--revision", help="Branch, tag or commit.", show_default=False)
Threads = typer.Option("--threads", min=1, help="All cores if not given.", show_default=False)


def quantize(
    model: Annotated[str, typer.Argument(help="Directory or hub id.", show_default=False)],
    output: Annotated[Path, Output],
    weights: Annotated[str, Format] = "w4a8",
    head_weights: Annotated[str, HeadFormat] = "auto",
    quantizer: Annotated[str, How] = "round-to-nearest",
    revision: Annotated[str | None, Revision] = None,
    threads: Annotated[int | None, Threads] = None,
    force: Annotated[bool, Force] = False,
    as_json: Json = False,
) -> None:
    """Write MODEL with its weights quantized and packed, and show what each part takes.

    Example: headrace quantize org/name --format w4a8 -o name-w4a8
    """
    from headrace.loading import quantize_model

    config = EngineConfig(
        model=model,
        revision=revision,
        weights=weights,
        head_weights=head_weights,
        num_threads=threads,
    )
    with progress("quantizing") as advance:
        packed = quantize_model(config, output, quantizer, force=force, progress=advance)
    rows = [
        ("linear weights", packed.weight_format, packed.layer_bytes),
        ("output head", packed.head_format, packed.head_bytes),
        ("embedding", "bf16", packed.embedding_bytes),
        ("norms and biases", "as stored", packed.vector_bytes),
        ("all", "", packed.num_bytes),
    ]
    report(
        {"output": str(output), **asdict(packed), "num_bytes": packed.num_bytes},
        (
            f"wrote {output}",
            ("", "format", "size"),
            [(name, format, show_bytes(size)) for name, format, size in rows if size],
        ),
        as_json=as_json,
    )
