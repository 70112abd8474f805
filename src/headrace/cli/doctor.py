"""``headrace doctor``: look at the machine and a model, and say what to expect."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from headrace.cli.options import ENGINE_OF_MODEL, takes
from headrace.cli.output import print_json, print_table, show, show_bytes, working
from headrace.config import EngineConfig

if TYPE_CHECKING:
    from headrace.cli.diagnosis import Machine, ModelEstimate


@takes(engine=ENGINE_OF_MODEL)
def doctor(
    engine: dict[str, Any],
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show the machine, its measured bandwidth, what MODEL needs, and what could be better."""
    from headrace.cli.diagnosis import examine

    with working("measuring the memory bandwidth"):
        machine, model, advice = examine(EngineConfig(**engine))
    if as_json:
        print_json({"machine": asdict(machine), "model": asdict(model), "advice": advice})
    else:
        print_table("machine", ("", "value"), _machine_rows(machine))
        print_table(f"model {model.name}", ("", "value"), _model_rows(model))
        for line in advice or ["Nothing stands in the way."]:
            print(f"- {line}")
    if model.problem is not None:
        raise typer.Exit(1)


def _machine_rows(machine: Machine) -> list[tuple[str, str]]:
    hardware = machine.hardware
    return [
        ("processor", hardware.processor),
        ("cores", f"{hardware.cores} usable of {machine.machine_cores}"),
        ("instruction sets", " ".join(hardware.isa) or "none of interest"),
        ("last-level cache", show_bytes(hardware.last_level_cache)),
        ("free memory", show_bytes(hardware.available_memory)),
        ("memory bandwidth", f"{hardware.memory_bandwidth / 1e9:.1f} GB/s"),
        ("headrace", machine.headrace),
        ("python, torch", f"{machine.python}, {machine.torch}"),
        ("device", machine.device),
        ("threads", str(machine.threads)),
    ]


def _model_rows(model: ModelEstimate) -> list[tuple[str, str]]:
    return [
        ("architecture", model.architecture),
        ("parameters", show(model.num_parameters)),
        ("stored as, computed in", f"{model.stored_dtype}, {model.dtype}"),
        ("weights", show_bytes(model.weight_bytes)),
        ("KV cache per token", show_bytes(model.kv_token_bytes)),
        ("tokens that fit the KV cache", show(model.cached_tokens)),
        ("context", f"{show(model.max_model_len)} of {show(model.context)} tokens"),
        ("decoding one sequence", _decode_bound(model)),
    ]


def _decode_bound(model: ModelEstimate) -> str:
    bound = model.decode_tokens_per_second
    return "not bound by memory" if bound is None else f"at most {show(bound)} tok/s"
