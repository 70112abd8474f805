"""Samples put together: medians, ratios, and shares of what the machine allows."""

from __future__ import annotations

from statistics import median
from typing import Any

from peers.limits import Limits, attainable
from peers.models import ensure_form, read_config, weight_bytes
from peers.programs import COMPARISONS, PROGRAMS
from peers.record import Record, Sample
from peers.workloads import WORKLOADS

COLUMNS = [
    "",
    "median",
    "lowest",
    "highest",
    "best headrace / it",
    "same width / it",
    "% of limit",
    "peak RSS, GiB",
    "% of RSS bound",
]


def title_of(comparison: str) -> str:
    """A comparison in words."""
    workload, _ = COMPARISONS[comparison]
    forced = comparison.removeprefix(workload).lstrip("-")
    return WORKLOADS[workload].title + (f", all forced to {forced}" if forced else "")


def tabulate(comparison: str, record: Record, shape: str) -> list[list[Any]]:
    """Rows of ``COLUMNS``, in the order of the programs."""
    samples = record.samples(comparison)
    medians = {name: median(s["value"] for s in samples[name]) for name in samples}
    smaller_wins = WORKLOADS[COMPARISONS[comparison][0]].figure == "start"

    def ratio(names: list[str], other: str) -> float | str:
        """How many times better the best of ``names`` is."""
        values = [medians[name] for name in names]
        if not values:
            return ""
        best = min(values) if smaller_wins else max(values)
        better, worse = (medians[other], best) if smaller_wins else (best, medians[other])
        return round(float(better / worse), 2)

    ours = [name for name in medians if PROGRAMS[name].driver == "headrace"]
    rows = []
    for name in [name for name in PROGRAMS if name in samples]:
        values = [sample["value"] for sample in samples[name]]
        same = [other for other in ours if PROGRAMS[other].bits == PROGRAMS[name].bits]
        limit = limit_of(comparison, record, name, shape)
        rows.append(
            [
                name,
                medians[name],
                min(values),
                max(values),
                ratio(ours, name),
                ratio(same, name),
                round(100 * medians[name] / limit, 1) if limit else "",
                round(max(sample["peak_rss"] for sample in samples[name]) / 2**30, 2),
                memory_share(samples[name][-1]),
            ]
        )
    return rows


def limit_of(comparison: str, record: Record, name: str, shape: str) -> float | None:
    """What the machine would allow a program to reach."""
    program, last = PROGRAMS[name], record.samples(comparison)[name][-1]
    config = read_config(shape)
    plain_kv = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return attainable(
        WORKLOADS[COMPARISONS[comparison][0]],
        config,
        Limits.median(record.limits(comparison)),
        program.bits,
        last.get("weight_bytes") or weight_bytes(ensure_form(shape, program.form)),
        last.get("kv_token_bytes") or plain_kv * program.kv_item_bytes,
    )


def memory_share(sample: Sample) -> float | str:
    """Peak memory in % of 1.25 times weights and KV cache, and 400 MB, where both are known.

    Weights quantized while loading are read from larger ones, whose pages count while they are
    mapped.
    """
    if "kv_bytes" not in sample:
        return ""
    bound = 1.25 * (sample["weight_bytes"] + sample["kv_bytes"]) + 400e6
    return round(100 * float(sample["peak_rss"] / bound), 1)


def settings_rows(comparisons: list[str], record: Record) -> list[list[str]]:
    """How each program ran; what differs between comparisons is that of the last."""
    settings = {
        name: samples[-1]["settings"]
        for comparison in comparisons
        for name, samples in record.samples(comparison).items()
    }
    return [
        [name, ", ".join(f"{key}={value}" for key, value in values.items())]
        for name, values in settings.items()
    ]


def failure_rows(comparisons: list[str], record: Record) -> list[list[str]]:
    """What gave no figure, and why."""
    return [
        [title_of(comparison), name, reason]
        for comparison in comparisons
        for name, reason in record.failures(comparison).items()
    ]
