"""Learning-rate schedules as pure functions: optimizer step (0, 1, ...) -> factor on the base learning rate.

The shapes are those of transformers and diffusers, which the reference calls, so curves of old runs come out
again. Steps are optimizer steps of the run, whatever the number of processes. `schedules.py` chooses and
applies them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from library.errors import ConfigError


def _rise(step: int, warmup: int) -> float:
    """The linear warm-up: 0 at step 0, 1 at step `warmup`."""
    return step / max(1, warmup)


def _progress(step: int, warmup: int, total: int) -> float:
    """Share of the steps after the warm-up that lies behind `step`."""
    return (step - warmup) / max(1, total - warmup)


def constant(step: int) -> float:
    """1 throughout."""
    return 1.0


def constant_with_warmup(step: int, *, warmup: int) -> float:
    """A linear rise, then 1."""
    return _rise(step, warmup) if step < warmup else 1.0


def linear(step: int, *, warmup: int, total: int) -> float:
    """A linear rise, then a linear fall to 0 at `total`."""
    if step < warmup:
        return _rise(step, warmup)
    return max(0.0, (total - step) / max(1, total - warmup))


def cosine(step: int, *, warmup: int, total: int, num_cycles: float = 0.5) -> float:
    """A linear rise, then `num_cycles` waves of a cosine; half a wave falls to 0 at `total`."""
    return cosine_with_min_lr(step, warmup=warmup, total=total, num_cycles=num_cycles, min_lr_rate=0.0)


def cosine_with_restarts(step: int, *, warmup: int, total: int, num_cycles: float) -> float:
    """A linear rise, then `num_cycles` falls to 0, each beginning at 1 again."""
    if step < warmup:
        return _rise(step, warmup)
    progress = _progress(step, warmup, total)
    if progress >= 1.0:
        return 0.0
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * ((num_cycles * progress) % 1.0))))


def polynomial(step: int, *, warmup: int, total: int, power: float, lr_end_rate: float) -> float:
    """A linear rise, then a fall to `lr_end_rate` by a power of what remains."""
    if step < warmup:
        return _rise(step, warmup)
    if step > total:
        return lr_end_rate
    remaining = 1 - _progress(step, warmup, total)
    return float((1 - lr_end_rate) * remaining**power + lr_end_rate)


def inverse_sqrt(step: int, *, warmup: int, timescale: int | None) -> float:
    """A linear rise, then 1 / sqrt of the step in units of `timescale` (default: warm-up or 10,000)."""
    if step < warmup:
        return _rise(step, warmup)
    scale = timescale or warmup or 10_000
    return 1.0 / math.sqrt((step + scale - warmup) / scale)


def cosine_with_min_lr(step: int, *, warmup: int, total: int, num_cycles: float, min_lr_rate: float) -> float:
    """A linear rise, then `num_cycles` waves of a cosine between 1 and `min_lr_rate`."""
    if step < warmup:
        return _rise(step, warmup)
    return _wave(_progress(step, warmup, total), num_cycles, min_lr_rate)


def cosine_warmup_with_min_lr(
    step: int,
    *,
    warmup: int,
    total: int,
    num_cycles: float,
    min_lr_rate: float,
    warmup_lr_rate: float | None = None,
) -> float:
    """As `cosine_with_min_lr`, but never 0: the rise begins at `warmup_lr_rate` (a share 1/warmup by
    default).
    """
    if step < warmup:
        if warmup_lr_rate is None:
            return (step + 1) / max(1, warmup)
        return warmup_lr_rate + (1 - warmup_lr_rate) * step / max(1, warmup - 1)
    return _wave(_progress(step + 1, warmup, total), num_cycles, min_lr_rate)


def _wave(progress: float, num_cycles: float, floor: float) -> float:
    factor = 0.5 * (1.0 + math.cos(math.pi * num_cycles * 2.0 * progress))
    return max(0.0, factor * (1 - floor) + floor)


_RISES: Mapping[str, Callable[[float], float]] = {
    "linear": lambda progress: progress,
    "cosine": lambda progress: 0.5 * (1 - math.cos(math.pi * progress)),
    "1-sqrt": lambda progress: 1 - math.sqrt(1 - progress),
}
_FALLS: Mapping[str, Callable[[float, float], float]] = {
    "linear": lambda progress, _cycles: 1 - progress,
    "cosine": lambda progress, cycles: 0.5 * (1 + math.cos(math.pi * cycles * 2 * progress)),
    "1-sqrt": lambda progress, _cycles: 1 - math.sqrt(progress),
}


def warmup_stable_decay(
    step: int,
    *,
    phases: tuple[int, int, int],
    num_cycles: float,
    min_lr_ratio: float,
    warmup_type: str = "linear",
    decay_type: str = "cosine",
) -> float:
    """A rise from `min_lr_ratio`, a plateau at 1 and a fall to `min_lr_ratio`; `phases` are their steps."""
    warmup, stable, decay = phases
    if step < warmup:
        factor = _RISES[warmup_type](_rise(step, warmup))
    elif step < warmup + stable:
        factor = 1.0
    elif step < warmup + stable + decay:
        factor = _FALLS[decay_type]((step - warmup - stable) / max(1, decay), num_cycles)
    else:
        factor = 0.0
    return max(0.0, factor * (1 - min_lr_ratio) + min_lr_ratio)


def check_shapes(*, warmup_type: str = "linear", decay_type: str = "cosine") -> None:
    """Refuse a shape of `warmup_stable_decay` that does not exist."""
    for name, value, known in (("warmup_type", warmup_type, _RISES), ("decay_type", decay_type, _FALLS)):
        if value not in known:
            raise ConfigError(f"lr_scheduler_args: {name}={value} is not one of {', '.join(known)}")


def piecewise_constant(step: int, *, rules: Sequence[tuple[int, float]], last: float) -> float:
    """The factor of the first rule (end step, factor), in order of end steps, that ends after `step`; else
    `last`.
    """
    return next((factor for end, factor in rules if step < end), last)


def read_step_rules(text: str) -> tuple[tuple[tuple[int, float], ...], float]:
    """diffusers' text "1:10,0.1:20,0.01": factor 1 before step 10, 0.1 before step 20, then 0.01."""
    *pieces, last = text.split(",")
    try:
        pairs = (piece.split(":") for piece in pieces)
        return tuple(sorted((int(end), float(factor)) for factor, end in pairs)), float(last)
    except ValueError as error:
        raise ConfigError(
            f'lr_scheduler_args: step_rules="{text}" is not of the form "1:10,0.1:20,0.01" (factor:end '
            "step, ..., last factor)"
        ) from error
