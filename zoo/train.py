"""The training loop of the family: a resumable run whose every step is determined by its seed."""

import json
import math
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from zoo.data import Batches
from zoo.induction import add_induction
from zoo.model import LanguageModel, ModelConfig, initialize

Optimizers = dict[str, torch.optim.Optimizer]


@dataclass(frozen=True)
class TrainConfig:
    """Settings of one run; rates are peaks, which ``learning_rate_scale`` scales.

    With ``induction``, training begins with heads that look back.
    ``decay`` gives the scale at some shares of the steps, rising from 0 to 1; it is linear between.
    """

    token_budget: int
    tokens_per_step: int = 8192
    muon_rate: float = 0.02
    adamw_rate: float = 3e-3
    weight_decay: float = 0.1
    gradient_clip: float = 1.0
    warmup_steps: int = 60
    decay: tuple[tuple[float, float], ...] = ((0.0, 1.0), (1.0, 0.0))
    embedding_deviation: float = 0.02
    induction: bool = False
    seed: int = 0
    checkpoint_seconds: float = 180.0
    log_seconds: float = 30.0


class Report(Protocol):
    """Receives the state of the run after every step."""

    def __call__(self, step: int, loss: float, tokens_per_second: float) -> None:
        """Show the loss in nats a token and the speed since the run was started."""


def learning_rate_scale(step: int, steps: int, config: TrainConfig) -> float:
    """Return the factor on the peak rates: a linear warm-up, then the decay of the settings."""
    warmup = (step + 1) / max(1, min(config.warmup_steps, steps // 5))
    shares, scales = zip(*config.decay, strict=True)
    return min(warmup, float(np.interp(step / steps, shares, scales)))


def build_optimizers(model: LanguageModel, config: TrainConfig) -> Optimizers:
    """Return Muon for the matrices of the layers and AdamW for the embedding and the norms.

    "Muon is Scalable for LLM Training"; "Decoupled Weight Decay Regularization".
    """
    named = list(model.named_parameters())
    matrices = [value for name, value in named if value.ndim == 2 and ".layers." in name]
    embeddings = [value for name, value in named if value.ndim == 2 and ".layers." not in name]
    norms = [value for _, value in named if value.ndim == 1]
    groups: list[dict[str, Any]] = [
        {"params": embeddings},
        {"params": norms, "weight_decay": 0.0},
    ]
    return {
        "muon": torch.optim.Muon(
            matrices,
            lr=config.muon_rate,
            weight_decay=config.weight_decay,
            adjust_lr_fn="original",
        ),
        "adamw": torch.optim.AdamW(
            groups, lr=config.adamw_rate, betas=(0.9, 0.95), weight_decay=config.weight_decay
        ),
    }


def atomic_save(value: object, path: Path) -> None:
    """Write ``value`` with ``torch.save`` so that ``path`` is always absent, old or complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".partial")
    with temporary.open("wb") as file:
        torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


@contextmanager
def stop_requests() -> Iterator[Callable[[], bool]]:
    """Turn SIGINT and SIGTERM into a flag that the loop reads between two steps."""
    received: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        received.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, remember) for number in signals}
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def progress_report(first_step: int, steps: int, config: TrainConfig) -> Iterator[Report]:
    """Give a progress bar on a terminal and a line every ``log_seconds`` elsewhere."""
    if sys.stdout.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(*columns) as progress:
            task = progress.add_task("training", total=steps, completed=first_step)

            def draw(step: int, loss: float, tokens_per_second: float) -> None:
                label = f"step {step}/{steps}  loss {loss:.3f}  {tokens_per_second:,.0f} tok/s"
                progress.update(task, completed=step, description=label)

            yield draw
        return

    printed = [-math.inf]

    def print_line(step: int, loss: float, tokens_per_second: float) -> None:
        now = time.monotonic()
        if now - printed[0] < config.log_seconds and step < steps:
            return
        printed[0] = now
        minutes = (steps - step) * config.tokens_per_step / tokens_per_second / 60
        speed = f"{tokens_per_second:,.0f} tok/s"
        print(f"step {step}/{steps}  loss {loss:.4f}  {speed}  {minutes:.1f} min left", flush=True)

    yield print_line


class Trainer:
    """One run: its model, its optimizers and how far it has come.

    ``directory`` receives ``checkpoint.pt`` and ``loss.jsonl``. The constructor takes up the
    checkpoint that it finds there and raises ValueError if that belongs to other settings.
    ``start`` are the weights to begin with, random ones if there are none.
    """

    def __init__(
        self,
        model_config: ModelConfig,
        config: TrainConfig,
        data: Batches,
        directory: Path,
        device: torch.device,
        start: dict[str, Tensor] | None = None,
    ) -> None:
        self.config, self.data, self.directory, self.device = config, data, directory, device
        self.identity = {
            "model": asdict(model_config),
            "training": asdict(config),
            "data": data.digest(),
        }
        self.model = LanguageModel(model_config)
        initialize(self.model, config.seed, config.embedding_deviation)
        if config.induction:
            add_induction(self.model)
        if start is not None:
            self.model.load_state_dict(start)
        self.model.to(device)
        self.optimizers = build_optimizers(self.model, config)
        self.step = 0
        self.seconds = 0.0
        torch.manual_seed(config.seed)
        directory.mkdir(parents=True, exist_ok=True)
        if self.checkpoint_path.exists():
            self._load()

    @property
    def is_finished(self) -> bool:
        """Whether the whole token budget has been spent."""
        return self.step >= self.data.steps

    @property
    def checkpoint_path(self) -> Path:
        """The file that a run is resumed from."""
        return self.directory / "checkpoint.pt"

    def run(self, stop_at: int | None = None) -> list[float]:
        """Train up to step ``stop_at``, by default the last; return the losses in nats a token.

        Returns early, behind a complete step and a checkpoint, if SIGINT or SIGTERM arrives.
        """
        steps = self.data.steps if stop_at is None else min(stop_at, self.data.steps)
        losses = []
        first_step, started = self.step, time.monotonic()
        saved = started
        with (
            stop_requests() as is_stopped,
            progress_report(first_step, self.data.steps, self.config) as report,
            (self.directory / "loss.jsonl").open("a", encoding="utf-8") as log,
        ):
            while self.step < steps and not is_stopped():
                begun = time.monotonic()
                losses.append(self._advance())
                now = time.monotonic()
                self.seconds += now - begun
                log.write(json.dumps(self._log_entry(losses[-1])) + "\n")
                done = (self.step - first_step) * self.config.tokens_per_step
                report(self.step, losses[-1], done / (now - started))
                if now - saved >= self.config.checkpoint_seconds:
                    log.flush()
                    self.save()
                    saved = now
        self.save()
        return losses

    def save(self) -> None:
        """Write the checkpoint; a run killed meanwhile keeps the previous one."""
        state = {
            "identity": self.identity,
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": {name: value.state_dict() for name, value in self.optimizers.items()},
            "random": {"torch": torch.get_rng_state(), "python": random.getstate()},
        }
        atomic_save(state, self.checkpoint_path)

    def _load(self) -> None:
        state = torch.load(self.checkpoint_path, map_location=self.device, weights_only=False)
        if state["identity"] != self.identity:
            raise ValueError(f"{self.checkpoint_path} was written under other settings")
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for name, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][name])
        torch.set_rng_state(state["random"]["torch"].cpu())
        random.setstate(state["random"]["python"])

    def mean_loss(self, steps: int = 50) -> float:
        """Return the mean training loss, in nats a token, of the last steps in the log."""
        with (self.directory / "loss.jsonl").open(encoding="utf-8") as log:
            # A step repeated after a kill appears twice; the later line is that of the model.
            losses = {entry["step"]: entry["loss"] for entry in map(json.loads, log)}
        last: list[float] = [losses[step] for step in sorted(losses) if step <= self.step][-steps:]
        return sum(last) / max(1, len(last))

    def _log_entry(self, loss: float) -> dict[str, Any]:
        tokens = self.step * self.config.tokens_per_step
        return {"step": self.step, "tokens": tokens, "loss": loss, "seconds": self.seconds}

    def _advance(self) -> float:
        """Make one step and return its loss in nats a token."""
        inputs, targets = (
            torch.from_numpy(array).to(self.device) for array in self.data.batch(self.step)
        )
        scale = learning_rate_scale(self.step, self.data.steps, self.config)
        loss = self._loss(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        rates = {"muon": self.config.muon_rate, "adamw": self.config.adamw_rate}
        for name, optimizer in self.optimizers.items():
            for group in optimizer.param_groups:
                group["lr"] = rates[name] * scale
            optimizer.step()
            optimizer.zero_grad()
        self.step += 1
        return loss.item()

    def _loss(self, inputs: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(self.device.type, dtype=torch.bfloat16):
            return self.model.loss(inputs, targets)
