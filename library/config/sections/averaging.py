"""[averaging] A running average of the trained weights, saved beside them."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.options import Limit, option


@dataclass(frozen=True, slots=True, kw_only=True)
class AveragingConfig:
    """Exponential moving average (EMA) of the network."""

    ema_decay: float | None = option(
        None,
        "keep a running average of the network: the share of it that each step keeps, such as 0.99 or 0.999; each "
        "adapter file gets a second one, -ema, beside it",
        limit=Limit(gt=0, le=0.999999),
        unset=(0.0,),
        ours=True,
    )
    ema_on_cpu: bool = option(False, "keep the average in main memory, not on the GPU", ours=True)
    ema_for_samples: bool = option(
        False, "draw samples and validate with the average instead of the weights in training", ours=True
    )
