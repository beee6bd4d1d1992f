"""[schedule] How the learning rate changes over the optimizer steps. Kohya's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Warm-up and decay: whole numbers are optimizer steps, fractions are shares of the run."""

    lr_scheduler: str = "constant"
    lr_scheduler_type: str = ""
    lr_scheduler_args: tuple[str, ...] = ()
    lr_warmup_steps: int | float = 0
    lr_decay_steps: int | float = 0
    lr_scheduler_num_cycles: int = 1
    lr_scheduler_power: float = 1
    lr_scheduler_timescale: int | None = None
    lr_scheduler_min_lr_ratio: float | None = None
