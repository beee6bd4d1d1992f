"""Where a run stands: all that a resume needs beside weights and optimizer, as one frozen value."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

STATE_VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainState:
    """Position of a run. Together with config, data and seed it determines everything that follows."""

    step: int  # optimizer steps done
    seed: int
    steps_per_epoch: int
    plan_fingerprint: str  # of data, batch size and seed: says whether the order ahead is the order before
    session_id: int
    started_at: float  # unix seconds of the first start
    losses: tuple[float, ...] = ()  # loss of each step of the current window of one epoch, oldest first
    validation_losses: tuple[tuple[int, float], ...] = ()  # (step, loss on the fixed draw)
    samples_seen: int = 0
    scaler: tuple[tuple[str, float], ...] = ()  # fp16 loss scaling

    @property
    def epoch(self) -> int:
        """Epoch that the next step belongs to, from 0."""
        return self.step // self.steps_per_epoch

    @property
    def epochs_begun(self) -> int:
        """Epoch that the last step belonged to, from 1."""
        return max(1, math.ceil(self.step / self.steps_per_epoch))

    @property
    def average_loss(self) -> float:
        """Mean loss of the last epoch's worth of steps, as Kohya's avr_loss."""
        return sum(self.losses) / len(self.losses) if self.losses else float("nan")

    def after_step(self, *, loss: float, samples: int) -> TrainState:
        """The state one optimizer step later."""
        window = (*self.losses, loss)[-self.steps_per_epoch :]
        return replace(self, step=self.step + 1, losses=window, samples_seen=self.samples_seen + samples)

    def after_validation(self, loss: float) -> TrainState:
        """The state with one more loss on the fixed validation draw."""
        return replace(self, validation_losses=(*self.validation_losses, (self.step, loss)))

    def to_json(self) -> dict[str, Any]:
        """Plain values; `current_epoch` and `current_step` are the names Kohya's own state has."""
        return {
            "version": STATE_VERSION,
            "current_epoch": self.epochs_begun,
            "current_step": self.step,
            **asdict(self),
        }

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> TrainState:
        """The inverse of `to_json`. KeyError when a field is missing."""
        plain = {f.name: _tuples(values[f.name]) for f in fields(cls)}
        return cls(**plain)


def falling_ratio(losses: Sequence[float]) -> float | None:
    """Mean of the last fifth over mean of the first fifth; None with fewer than two values or nothing to fall."""
    part = max(1, round(len(losses) / 5))
    first = sum(losses[:part]) / part
    return sum(losses[-part:]) / part / first if len(losses) > 1 and first > 0 else None


def _tuples(value: Any) -> Any:
    return tuple(_tuples(item) for item in value) if isinstance(value, list) else value
