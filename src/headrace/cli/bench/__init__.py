"""``headrace bench``: measure latency, throughput, or a server under load."""

from __future__ import annotations

import typer

from headrace.cli.bench.latency import latency
from headrace.cli.bench.serve import serve
from headrace.cli.bench.throughput import throughput

bench = typer.Typer(help="Measure latency, throughput, or a server.", no_args_is_help=True)
bench.command()(latency)
bench.command()(throughput)
bench.command()(serve)
