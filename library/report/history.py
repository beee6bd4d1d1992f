"""What a run log tells beside its curves: where the run stands, where its time went, what it wrote and warned of."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from library.config.notices import code_of
from library.files.hashes import file_sha256
from library.train.run_log import (
    Ended,
    Line,
    Outliers,
    Record,
    Saved,
    Started,
    Stepped,
    Validated,
    Warned,
)
from library.train.spent import PARTS, Spent

Json = dict[str, object]
R = TypeVar("R", bound=Record)
SHOWN = 0.005  # seconds; a part that took less is left out
RECENT = 50  # steps that speed is averaged over
_STATUS = {"done": "finished", "early stop": "finished", "stopped": "stopped", "error": "failed"}
_COLOURS = dict(zip(PARTS, (0, 1, 2, 3, 4, 5, 6, 7, 7, 0), strict=True))
_MARKS = {"model": "network", "ema": "EMA", "best": "best", "state": "state"}


def of_kind(lines: Sequence[Line], kind: type[R]) -> list[R]:
    """The records of one kind, oldest first."""
    return [line.record for line in lines if isinstance(line.record, kind)]


def standing(lines: Sequence[Line], *, secrets: Sequence[str] = ()) -> Json:
    """Where the run is: status, position, speed and best validation loss; what ended it, without its secrets."""
    starts, steps = of_kind(lines, Started), of_kind(lines, Stepped)
    ended = lines[-1].record if lines and isinstance(lines[-1].record, Ended) else None
    recent = steps[-RECENT:]
    seconds = sum(step.seconds for step in recent)
    best = lowest_validation(of_kind(lines, Validated))
    start = starts[-1] if starts else None
    return {
        "status": _STATUS.get(ended.why, "stopped") if ended else "running",
        "message": _masked(ended.message, secrets) if ended else "",
        "step": steps[-1].step if steps else start.step if start else 0,
        "total_steps": start.total_steps if start else 0,
        "epoch": steps[-1].epoch if steps else 1,
        "num_epochs": start.num_epochs if start else 0,
        "device": start.device if start else "",
        "num_ranks": start.num_ranks if start else 1,
        "started_at": lines[0].time if lines else None,
        "updated_at": lines[-1].time if lines else None,
        "seconds": sum(Spent(lines).totals().values()),
        "seconds_per_step": seconds / len(recent) if recent else None,
        "images_per_second": _mean([step.images_per_second for step in recent]),
        "average_loss": steps[-1].average_loss if steps else None,
        "first_average": _after_first_epoch(steps),
        "best": {"step": best.step, "loss": best.loss} if best else None,
        "peak_memory": max((step.memory_gb or 0.0 for step in steps), default=0.0) * 1e9 or None,
    }


def lowest_validation(measured: Sequence[Validated]) -> Validated | None:
    """The best, as `keep_best` sees it: what was measured before training belongs to no file."""
    trained = [one for one in measured if one.step > 0 and is_number(one.loss)]
    return min(trained, key=lambda one: one.loss, default=None)


def time_split(spent: Spent) -> list[Json]:
    """Seconds by what they were spent on, largest first."""
    return [
        {"name": part, "value": round(seconds, 2), "colour": _COLOURS[part]}
        for part, seconds in sorted(spent.totals().items(), key=lambda one: -one[1])
        if seconds >= SHOWN
    ]


def notices(lines: Sequence[Line], at_start: Sequence[str], *, secrets: Sequence[str] = ()) -> list[Json]:
    """What was said before the run and warned of during it, each sentence once, without its secrets."""
    said: list[tuple[int | None, str, str]] = [(None, "WARNING", text) for text in at_start]
    said += [(warned.step, warned.level, warned.message) for warned in of_kind(lines, Warned)]
    rows: dict[str, Json] = {}
    for step, level, text in said:
        code = code_of(text)
        shown = _masked(text.removeprefix(f"[{code}] ") if code else text, secrets)
        rows.setdefault(shown, {"step": step, "level": level, "code": code, "text": shown})
    return list(rows.values())


def last_outliers(lines: Sequence[Line]) -> Outliers | None:
    """The pictures that stood out when that was last looked at."""
    found = of_kind(lines, Outliers)
    return found[-1] if found else None


class Checkpoints:
    """The table of what was saved; a file's hash is worked out once."""

    def __init__(self) -> None:
        self._hashes: dict[tuple[str, int, int], str] = {}

    def table(self, lines: Sequence[Line], folder: Path) -> list[Json]:
        """One row for each file or state folder, by step; the step of the lowest validation loss is marked."""
        measured, starts = of_kind(lines, Validated), of_kind(lines, Started)
        losses = {one.step: one.loss for one in measured if is_number(one.loss)}
        lowest = lowest_validation(measured)
        # Validation sees the average or the weights in training; its loss is none of the others'.
        unseen = "model" if starts and starts[-1].options.get("ema_for_samples") else "ema"
        saved = {one.file: one for one in of_kind(lines, Saved)}
        ordered = sorted(saved.values(), key=lambda one: one.step)
        return [
            self._row(
                one,
                folder / one.file,
                loss=None if one.what == unseen else losses.get(one.step),
                is_lowest=lowest is not None
                and one.step == lowest.step
                and one.what not in (unseen, "state", "best"),
            )
            for one in ordered
        ]

    def _row(self, saved: Saved, path: Path, *, loss: float | None, is_lowest: bool) -> Json:
        return {
            "file": saved.file, "step": saved.step, "validation": loss,
            "marks": [_MARKS.get(saved.what, saved.what), *(["best step"] if is_lowest else [])],
            "exists": path.exists(), "bytes": _size(path), "sha256": self._hash(path),
        }  # fmt: skip

    def _hash(self, path: Path) -> str | None:
        try:
            found = path.stat()
            key = (str(path), found.st_size, found.st_mtime_ns)
            if path.is_file() and key not in self._hashes:
                self._hashes[key] = file_sha256(path)
        except OSError:
            return None
        return self._hashes.get(key)


def _size(path: Path) -> int:
    try:
        if path.is_dir():
            return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        return path.stat().st_size
    except OSError:
        return 0


def _after_first_epoch(steps: Sequence[Stepped]) -> float | None:
    first = [step.average_loss for step in steps if step.epoch == 1]
    return first[-1] if first and steps[-1].epoch > 1 else None


def is_number(value: float | None) -> bool:
    """Whether there is something to show: a log holds None for what was not finite."""
    return value is not None and math.isfinite(value)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _masked(text: str, secrets: Sequence[str]) -> str:
    for secret in secrets:
        text = text.replace(secret, "***")
    return text
