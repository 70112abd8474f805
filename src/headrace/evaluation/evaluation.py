"""A whole evaluation: a suite put to a configuration, kept as it goes, summed up."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.evaluation.language import (
    TOP,
    bits_per_byte,
    divergences,
    loss_estimate,
    score_windows,
    text_windows,
)
from headrace.evaluation.statistics import mean_estimate
from headrace.evaluation.suite import Suite
from headrace.evaluation.task_run import run_task
from headrace.llm import LLM

Row = dict[str, Any]
"""One measure: ``measure``, ``value``, ``low``, ``high``, ``items``; or ``skipped``."""

OpenLLM = Callable[[], LLM]


@dataclass(frozen=True, slots=True)
class Subject:
    """A configuration under test.

    Args:
        label: in tables.
        options: of ``LLM``, ``model`` among them.
    """

    label: str
    options: dict[str, Any]

    def open(self) -> LLM:
        """Load it."""
        return LLM(**self.options)

    def files(self) -> list[tuple[str, int, int]]:
        """Name, bytes and time of change of each file of a local model, which tell it from what
        will be at its place when it has been trained anew.
        """
        model = Path(self.options.get("model") or "")
        found = sorted(model.iterdir()) if model.is_dir() and model.name else []
        states = [(file.name, file.stat()) for file in found]
        return [(name, state.st_size, state.st_mtime_ns) for name, state in states]


class Evaluation:
    """Puts a suite to a subject and keeps every part as soon as it is done.

    Args:
        reference: what predictions are compared with; the subject itself has none.
        record: a file to keep results in and to go on from; ``None`` for none.
        seed: of the problems.
        notify: called with (parts done, parts in all, name of the one that begins).

    Raises:
        ConfigurationError: the record is of another evaluation.
    """

    def __init__(
        self,
        suite: Suite,
        subject: Subject,
        reference: Subject | None,
        record: Path | None = None,
        seed: int = 0,
        notify: Callable[[int, int, str], None] | None = None,
    ) -> None:
        self._suite, self._subject, self._reference = suite, subject, reference
        self._record, self._seed = record, seed
        self._notify = notify or (lambda done, total, name: None)
        self._parts: dict[str, Any] = {}
        subjects = [(each.options, each.files()) for each in (subject, reference) if each]
        identity = [suite.name, subjects, seed]
        text = json.dumps(identity, sort_keys=True, default=str)
        self._identity = hashlib.sha256(text.encode()).hexdigest()[:16]
        if record is not None and record.exists():
            self._resume(record)

    def _resume(self, record: Path) -> None:
        text = record.read_text("utf-8")
        if not text.endswith("\n"):
            # The line that was being written when the run was killed.
            text = text[: text.rfind("\n") + 1]
            record.write_text(text, "utf-8")
        for line in text.splitlines():
            entry = json.loads(line)
            if entry["identity"] != self._identity:
                raise ConfigurationError(
                    f"{record} is of another evaluation, or of a model that has changed since; "
                    "remove it or name another file"
                )
            self._parts[entry["part"]] = entry["result"]

    def _keep(self, part: str, result: Any) -> Any:
        self._parts[part] = result
        if self._record is not None:
            self._record.parent.mkdir(parents=True, exist_ok=True)
            with self._record.open("a", encoding="utf-8") as file:
                entry = {"identity": self._identity, "part": part, "result": result}
                print(json.dumps(entry), file=file, flush=True)
        return result

    def run(self) -> dict[str, Any]:
        """Measure what is missing; returns facts, rows and the single scores."""
        started = time.perf_counter()
        names = ["text", *(plan.name for plan in self._suite.plans)]
        with self._subject.open() as llm:
            for done, name in enumerate(names):
                self._notify(done, len(names), name)
                if name in self._parts:
                    continue
                if name == "text":
                    self._keep(name, self._measure_text(llm))
                else:
                    plan = self._suite.plans[done - 1]
                    self._keep(name, asdict(run_task(llm, plan, self._seed)))
            self._notify(len(names), len(names), "")
            info, peak = llm.model_info, llm.stats().pages_peak
        tasks = [self._parts[plan.name] for plan in self._suite.plans]
        tokens = sum(part["prompt_tokens"] + part["output_tokens"] for part in tasks)
        return {
            "subject": self._subject.label,
            "suite": self._suite.name,
            "seed": self._seed,
            "weight_bytes": info.weight_bytes,
            "weight_format": info.weight_format,
            "kv_peak_bytes": peak * info.page_bytes,
            "score": self.score(),
            "tokens_per_second": tokens / max(1e-9, sum(part["seconds"] for part in tasks)),
            "seconds": time.perf_counter() - started,
            "rows": self.rows(),
            "parts": self._parts,
        }

    def _measure_text(self, llm: LLM) -> dict[str, Any]:
        window = min(self._suite.window, llm.model_info.max_model_len)
        windows = text_windows(llm, window, self._suite.tokens)
        try:
            scored = score_windows(llm, windows, TOP if self._reference else 0)
        except InvalidRequestError as error:
            return {"skipped": str(error)}
        result: dict[str, Any] = {
            "losses": [each.loss for each in scored],
            "counts": [len(each.counted) for each in windows],
            "loss": asdict(loss_estimate(windows, scored)),
            "bits_per_byte": bits_per_byte(windows, scored),
        }
        if self._reference is not None:
            with self._reference.open() as other:
                reference = score_windows(other, windows, TOP)
            result["divergences"] = divergences(reference, scored)
        return result

    def rows(self) -> list[Row]:
        """Every measure with its interval."""
        rows = self._text_rows()
        for plan in self._suite.plans:
            result = self._parts[plan.name]
            if result["skipped"]:
                rows.append({"measure": plan.name, "skipped": result["skipped"]})
                continue
            estimate = mean_estimate(result["scores"])
            count = len(result["scores"])
            rows.append({"measure": plan.name, **asdict(estimate), "items": count})
        return rows

    def _text_rows(self) -> list[Row]:
        text = self._parts["text"]
        loss = {"measure": "loss, nats a token"}
        if "skipped" in text:
            return [{**loss, "skipped": text["skipped"]}]
        items = sum(text["counts"])
        rows: list[Row] = [{**loss, **text["loss"], "items": items}]
        rows.append({"measure": "bits per byte", "mean": text["bits_per_byte"], "items": items})
        if "divergences" in text:
            estimate = mean_estimate(text["divergences"], text["counts"])
            row = {"measure": "KL to the reference, nats", **asdict(estimate), "items": items}
            rows.append(row)
        return rows

    def score(self) -> float:
        """The mean over all tasks that were run."""
        run = [self._parts[plan.name]["scores"] for plan in self._suite.plans]
        means: list[float] = [sum(scores) / len(scores) for scores in run if scores]
        return sum(means) / max(1, len(means))
