"""[schedule] How the learning rate runs over the steps."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.options import Limit, option

LR_SCHEDULERS = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "cosine_warmup_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
    "reduce_lr_on_plateau",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Learning rate schedule."""

    lr_scheduler: str = option(
        "constant", "schedule by name: constant, constant_with_warmup, linear, cosine, ..."
    )
    lr_scheduler_type: str = option("", "a scheduler class of one's own, as package.Class")
    lr_scheduler_args: tuple[str, ...] = option((), "further arguments of the scheduler, as key=value")
    lr_warmup_steps: int | float = option(
        0, "warm-up: steps, a share below 1, or a percentage", limit=Limit(ge=0)
    )
    lr_decay_steps: int | float = option(
        0, "decay: steps, a share below 1, or a percentage", limit=Limit(ge=0)
    )
    lr_scheduler_num_cycles: int = option(1, "restarts of cosine_with_restarts", limit=Limit(ge=0))
    lr_scheduler_power: float = option(1.0, "power of polynomial", limit=Limit(ge=0))
    lr_scheduler_timescale: int | None = option(
        None,
        "time scale of inverse_sqrt; unset is lr_warmup_steps",
        limit=Limit(ge=1, unit="steps"),
        unset=(0,),
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "lowest learning rate as a share of the highest", limit=Limit(ge=0, le=1)
    )
