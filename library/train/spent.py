"""Where a run's wall time goes, told by the lines of its log: the time before a line went to what the line is about.

So all parts add up to the time that its processes ran, up to the last line. A training step is split by the laps of its
device: where that waited for a batch, and where it ran forward and backward.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

from library.config.train_config import OPTIONS
from library.train.run_log import Line, Record, Sampled, Saved, Started, Stepped, Validated, Warned

LONGEST_PAUSE = 6 * 3600  # seconds; a longer gap in a log is a clock that was set
PASSES, DATA, REST = "forward and backward", "waiting for data", "optimizer and the rest of a step"
UNSPLIT = "training"  # steps of a log without laps
CACHING, START, OTHER = "caching", "starting", "everything else"
VALIDATION, SAMPLES, SAVING = "validation", "sample images", "saving"
_OCCASIONS: Mapping[type[Record], str] = {Validated: VALIDATION, Sampled: SAMPLES, Saved: SAVING}
PARTS = (PASSES, DATA, REST, VALIDATION, SAMPLES, SAVING, CACHING, START, OTHER, UNSPLIT)

MUCH, NOTABLE = 0.1, 10.0  # share of the steps' time, and seconds, above which waiting for data is spoken of


class Spent:
    """Adds up seconds, line by line."""

    def __init__(self, lines: Sequence[Line] = ()) -> None:
        self._before: Line | None = None
        self._steps = self._data = self._passes = 0.0
        self._other: dict[str, float] = defaultdict(float)
        self._options: Mapping[str, object] = {}
        for line in lines:
            self.add(line)

    def add(self, line: Line) -> None:
        """Count the time before `line`. A warning comes in the middle of something, and does not end it."""
        record, before = line.record, self._before
        if isinstance(record, Warned):
            return
        self._before = line
        if isinstance(record, Started):
            self._options = record.options
            for phase, seconds in record.start_seconds.items():
                self._other[CACHING if phase == "caches" else START] += seconds
            return
        gap = max(0.0, line.time - before.time) if before is not None else 0.0
        if gap > LONGEST_PAUSE:
            return
        if isinstance(record, Stepped):
            gap -= self._step(record, gap)
        starts = before is not None and isinstance(before.record, Started)
        self._other[START if starts else _OCCASIONS.get(type(record), OTHER)] += gap

    def _step(self, record: Stepped, gap: float) -> float:
        taken = min(gap, record.seconds)
        if record.data_seconds is None or record.forward_backward_seconds is None:
            self._other[UNSPLIT] += taken
        else:
            self._steps += taken
            self._data += record.data_seconds
            self._passes += record.forward_backward_seconds
        return taken

    def totals(self) -> dict[str, float]:
        """Seconds by part; a part that took no time is left out."""
        # Where steps run ahead a lap may lie in the seconds of the step before, so only sums are compared.
        data = min(self._data, self._steps)
        passes = min(self._passes, self._steps - data)
        found = {PASSES: passes, DATA: data, REST: self._steps - data - passes, **self._other}
        return {part: found[part] for part in PARTS if found.get(part, 0.0) > 0}

    def advice(self) -> str | None:
        """A sentence where much of the steps' time went into waiting for data."""
        data = self.totals().get(DATA, 0.0)
        if data < NOTABLE or data < MUCH * self._steps:
            return None
        return f"training steps waited for data {data / self._steps:.0%} of their time: {self._remedies()}"

    def _remedies(self) -> str:
        workers = self._options.get(_WORKERS, OPTIONS[_WORKERS].row.default)
        uncached = not any(self._options.get(name) for name in ("cache_latents", "cache_latents_to_disk"))
        return "; ".join(
            [
                *(
                    ["set cache_latents_to_disk, so that pictures are read and scaled once"]
                    if uncached
                    else []
                ),
                f"raise {_WORKERS} (it is {workers}; at most one for each core is started)",
                "or put pictures and caches on a faster disk",
            ]
        )


_WORKERS = "max_data_loader_n_workers"
