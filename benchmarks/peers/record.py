"""What was measured, in a file that an interrupted comparison goes on from."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peers.limits import Limits

Sample = dict[str, Any]
"""What a driver reports of one workload."""


class Record:
    """Samples, failures and limits of one shape; a line of JSON for each, written at once.

    Args:
        path: of the file. What it holds already is read; ``None`` keeps everything in memory.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._samples: dict[tuple[str, str, int], Sample] = {}
        self._failures: dict[tuple[str, str], str] = {}
        self._limits: dict[tuple[str, int], Limits] = {}
        if path is not None and path.exists():
            for line in path.read_text().splitlines():
                self._take(json.loads(line))

    def _take(self, entry: dict[str, Any]) -> None:
        name, number, member = entry["comparison"], entry["round"], str(entry.get("program"))
        if "limits" in entry:
            self._limits[name, number] = Limits(**entry["limits"])
        elif "sample" in entry:
            self._samples[name, member, number] = entry["sample"]
            self._failures.pop((name, member), None)
        else:
            self._failures[name, member] = entry["failure"]

    def _add(self, **entry: Any) -> None:
        self._take(entry)
        if self._path is not None:
            with self._path.open("a") as file:
                print(json.dumps(entry), file=file)

    def add_sample(self, comparison: str, program: str, number: int, sample: Sample) -> None:
        """Keep what a program reported in a round."""
        self._add(comparison=comparison, program=program, round=number, sample=sample)

    def add_failure(self, comparison: str, program: str, number: int, reason: str) -> None:
        """Keep why a program gave nothing."""
        self._add(comparison=comparison, program=program, round=number, failure=reason)

    def add_limits(self, comparison: str, number: int, limits: Limits) -> None:
        """Keep what the machine allowed in a round."""
        self._add(comparison=comparison, round=number, limits=asdict(limits))

    def has(self, comparison: str, program: str, number: int) -> bool:
        """Whether a program has been measured in that round."""
        return (comparison, program, number) in self._samples

    def has_limits(self, comparison: str, number: int) -> bool:
        """Whether the machine has been measured in that round."""
        return (comparison, number) in self._limits

    def samples(self, comparison: str) -> dict[str, list[Sample]]:
        """Program -> what its processes reported."""
        found: dict[str, list[Sample]] = {}
        for (name, program, _), sample in self._samples.items():
            if name == comparison:
                found.setdefault(program, []).append(sample)
        return found

    def failures(self, comparison: str) -> dict[str, str]:
        """Program -> why it gave nothing, or stopped giving."""
        return {
            program: why for (name, program), why in self._failures.items() if name == comparison
        }

    def limits(self, comparison: str) -> list[Limits]:
        """Measured before each round."""
        return [limits for (name, _), limits in self._limits.items() if name == comparison]
