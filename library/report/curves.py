"""Curves of a run's numbers for its charts; long ones are put together so that no peak is lost."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise

from library.train.run_log import Stepped, Validated

Json = dict[str, object]
MOST_POINTS = 2000  # a chart is about a thousand pixels wide
GROUPS = 1000  # that a longer curve is put together into
DIGITS = 5


def charts(steps: Sequence[Stepped], validations: Sequence[Validated]) -> list[Json]:
    """The charts of a report, in order; those that nothing was measured for are left out."""
    xs = [step.step for step in steps]
    found = [
        _chart("Loss", [
            series("training", xs, [step.loss for step in steps]),
            series("validation", *_validation(validations), points=True),
        ], log=True, smooth=True, wide=True),
        _chart("Validation loss by noise level", _by_timestep(validations), "t = 1000 is pure noise", log=True),
        _chart("Learning rate", _rates(steps), log=True),
        _chart("Gradient norm", [series("before clipping", xs, [step.grad_norm for step in steps])],
               log=True, smooth=True),
        _chart("Seconds a step", [series("step", xs, [step.seconds for step in steps])], log=True, smooth=True),
        _chart("Peak memory", [series("first GPU", xs, [step.memory_gb for step in steps])], "GB", zero=True),
    ]  # fmt: skip
    return [chart for chart in found if chart["series"]]


def series(
    name: str, xs: Sequence[int], ys: Sequence[float | None], *, points: bool = False
) -> Mapping[str, object]:
    """One line: `x` and `y`, and `low` and `high` where many points became one. `points` are never smoothed."""
    known = [(x, y) for x, y in zip(xs, ys, strict=True) if y is not None and math.isfinite(y)]
    line: Json = {"name": name, **({"points": True} if points else {})}
    if len(known) <= MOST_POINTS:
        return {**line, "x": [x for x, _ in known], "y": [_short(y) for _, y in known]}
    edges = [round(i * len(known) / GROUPS) for i in range(GROUPS + 1)]
    groups = [known[a:b] for a, b in pairwise(edges)]
    values = [[y for _, y in group] for group in groups]
    return {
        **line,
        "x": [group[len(group) // 2][0] for group in groups],
        "y": [_short(sum(ys) / len(ys)) for ys in values],
        "low": [_short(min(ys)) for ys in values],
        "high": [_short(max(ys)) for ys in values],
    }


def _chart(
    title: str,
    lines: Iterable[Mapping[str, object]],
    unit: str = "",
    *,
    log: bool = False,
    smooth: bool = False,
    zero: bool = False,
    wide: bool = False,
) -> Json:
    """`log`: has a logarithmic scale on demand; `zero`: begins at 0; `wide`: takes a whole row."""
    return {
        "title": title, "unit": unit, "log": log, "smooth": smooth, "zero": zero, "wide": wide,
        "series": [line for line in lines if line["x"]],
    }  # fmt: skip


def _validation(validations: Sequence[Validated]) -> tuple[list[int], list[float]]:
    return [one.step for one in validations], [one.loss for one in validations]


def _by_timestep(validations: Sequence[Validated]) -> list[Mapping[str, object]]:
    names = dict.fromkeys(chain.from_iterable(one.by_timestep for one in validations))
    return [
        series(
            f"t = {float(name):g}",
            [one.step for one in validations if name in one.by_timestep],
            [one.by_timestep[name] for one in validations if name in one.by_timestep],
            points=True,
        )
        for name in sorted(names, key=float)
    ]


def _rates(steps: Sequence[Stepped]) -> list[Mapping[str, object]]:
    found: dict[str, tuple[list[int], list[float]]] = defaultdict(lambda: ([], []))
    for step in steps:
        for name, rate in step.learning_rates.items():
            found[name][0].append(step.step)
            found[name][1].append(rate)
    return [series(name, xs, ys, points=True) for name, (xs, ys) in found.items()]


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")
