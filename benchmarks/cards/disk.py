"""Methods that decide what is in memory and what on disk."""

from __future__ import annotations

from typing import Any

import offload

from cards.measuring import Rows, Setup
from headrace.evaluation.measured import Measurement

NAME = "flexgen"
CLAIM = "OPT-175B on one 16 GB GPU: 1 token/s at a batch of 144"


def offloading(setup: Setup) -> Rows:
    """A model three times as large as its memory; see ``offload``."""
    rounds = min(3, setup.rounds)
    result = offload.measure(rounds, setup.quick)
    on, off = result.details["with"], result.details["without"]
    sample = f"{rounds} rounds"
    shape = setup.of("narrow 1B shape", "tiny shape")
    about: dict[str, Any] = {
        "model": f"{shape}, random weights, bf16, three times the memory",
        "options": f"{NAME}:memory={result.details['cap']}",
    }
    rows: list[Measurement] = []
    for work, what in (("decode", f"decoding of {offload.SEQUENCES}"), ("prompts", "prompts")):
        own, other = on[work], off[work]
        rows += [
            Measurement(
                f"{what}, tokens/s",
                own["tokens_per_second"],
                sample,
                beside={"without overlap": other["tokens_per_second"]},
                claim=CLAIM if work == "decode" else "",
                **about,
            ),
            Measurement(
                f"{what}: bytes read, of the disk's bandwidth",
                own["of_disk"],
                sample,
                beside={"without overlap": other["of_disk"]},
                **about,
            ),
            Measurement(
                f"{what}: speed, without overlap = 1",
                own["tokens_per_second"] / other["tokens_per_second"],
                sample,
                beside={"without overlap": 1.0},
                **about,
            ),
        ]
    rows.append(
        Measurement(
            "memory at the peak beyond the interpreter and its libraries, of the cap",
            on["peak"] / result.details["cap"],
            sample,
            **about,
        )
    )
    return {NAME: rows}
