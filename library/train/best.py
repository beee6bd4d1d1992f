"""Which validation was the best, and when there have been enough without a better one.

Both follow from the losses a run has measured, (step, loss) in order, which are part of its state. The first of them
was measured before training and counts for neither: there is no adapter that could be kept of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from library.config.sections.validation import ValidationConfig

Measured = Sequence[tuple[int, float]]


def lowest(losses: Measured) -> tuple[int, float] | None:
    """Step and loss of the best validation, the first of equals; None before there is one."""
    finite = [pair for pair in losses[1:] if not math.isnan(pair[1])]
    return min(finite, key=lambda pair: pair[1], default=None)


def is_best(losses: Measured) -> bool:
    """Whether the last validation is the best so far."""
    best = lowest(losses)
    return best is not None and best == losses[-1]


def without_improvement(losses: Measured, *, min_delta: float) -> int:
    """How many validations there have been since the last that was more than `min_delta` below all before it."""
    best, count = math.inf, 0
    for _, loss in losses[1:]:
        if loss < best - min_delta:
            best, count = loss, 0
        else:
            count += 1
    return count


def has_stalled(losses: Measured, config: ValidationConfig) -> bool:
    """Whether early stopping ends a run with these losses."""
    patience = config.early_stop_patience
    if patience is None:
        return False
    return without_improvement(losses, min_delta=config.early_stop_min_delta) >= patience
