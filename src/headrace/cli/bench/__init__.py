"""``headrace bench``: measure latency, throughput, or a server under load."""

from __future__ import annotations

import typer

from headrace.cli.bench.engine import latency, throughput
from headrace.cli.bench.serve import serve

bench = typer.Typer(help="Measure latency, throughput, or a server.", no_args_is_help=True)
for command in (latency, throughput, serve):
    bench.command()(command)
