"""The run log: what a run did, one JSON object a line, in `<output_dir>/<output_name>-log.jsonl`.

A line is `{"kind": ..., "time": <unix seconds>, **fields}` with the fields of the record of that kind. Lines come in
the order in which things happened, written by rank 0 alone. A run that goes on from a state drops what lies behind
the step it goes on from and appends, so steps only rise; one that starts afresh starts a new file. `read_log` gives
it back; it passes over kinds and fields that it does not know, and over a last line cut short. Fields that older
logs lack have defaults.

A log is an extra: where it cannot be written, one warning is said and training goes on.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any

from library.files.atomic import write_text
from library.train.naming import last_stem

logger = logging.getLogger(__name__)

LOG_SUFFIX = "-log.jsonl"
FLUSH_SECONDS = 1.0  # a disk that is slow to answer is asked no more often


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """This process begins to train; once for each time a run was started or resumed."""

    step: int  # steps done already
    total_steps: int
    num_epochs: int
    steps_per_epoch: int
    resumed: bool
    num_ranks: int
    device: str  # name of rank 0's device
    num_images: int  # different pictures that are trained on
    num_validation_images: int
    # Given another value than their default; no secrets, none of Kohya's private ones.
    options: Mapping[str, object]
    start_seconds: Mapping[str, float] = field(default_factory=dict)  # of this process up to here, by phase


@dataclass(frozen=True, slots=True, kw_only=True)
class Stepped:
    """One optimizer step."""

    step: int  # from 1
    epoch: int  # from 1
    loss: float  # mean over the step's samples, all ranks
    average_loss: float  # mean over the last epoch's worth of steps
    # By parameter group, and d*lr/<group> of optimizers that find their rate.
    learning_rates: Mapping[str, float]
    grad_norm: float | None  # before clipping; None where fp16 overflowed
    seconds: float  # since the report of the step before, or since this one began
    images_per_second: float  # over all ranks
    memory_gb: float | None  # peak of rank 0's GPU so far, 10**9 bytes; None on a CPU
    skipped: bool  # fp16 overflow: nothing was updated
    # Of rank 0's device: waiting for batches; forward and backward, with what ranks exchange meanwhile.
    data_seconds: float | None = None
    forward_backward_seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated:
    """A validation on the fixed draw."""

    step: int
    loss: float
    by_timestep: Mapping[str, float]  # timestep of 0..1000, as text, to the loss there
    best: bool  # the lowest loss of the run so far


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampled:
    """A sample image was written."""

    step: int
    prompt_number: int
    prompt: str
    file: str  # relative to output_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved:
    """A file or a state folder was written."""

    step: int
    what: str  # model, ema, best or state
    file: str  # relative to output_dir


@dataclass(frozen=True, slots=True, kw_only=True)
class Warned:
    """A warning or an error that was said."""

    step: int
    level: str  # WARNING, ERROR or CRITICAL
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Outlier:
    """A picture whose loss is far above that of the others at the same noise levels."""

    image: str  # key of the picture: "<dataset>/<folder>/<file name>"
    score: float  # robust z-score: standard deviations above the median picture
    loss: float  # mean of loss / expected loss at that noise level; 1 is the usual picture
    visits: int  # how often it was seen


@dataclass(frozen=True, slots=True, kw_only=True)
class Outliers:
    """The end of an epoch: pictures that stand out, highest score first; empty where none does."""

    step: int
    epoch: int
    images: Sequence[Outlier]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """This process ends."""

    step: int
    why: str  # done, early stop, stopped (by a signal) or error
    message: str  # in words; "" where there is nothing to add


Record = Started | Stepped | Validated | Sampled | Saved | Warned | Outliers | Ended
Write = Callable[[Record], None]

KINDS: Mapping[str, type[Record]] = {
    "start": Started, "step": Stepped, "validation": Validated, "sample": Sampled, "save": Saved,
    "warning": Warned, "outliers": Outliers, "end": Ended,
}  # fmt: skip
NAMES = {record: name for name, record in KINDS.items()}


@dataclass(frozen=True, slots=True)
class Line:
    """One line of a log."""

    time: float  # unix seconds
    record: Record


def log_path(output_dir: Path, output_name: str | None) -> Path:
    """Where the log of a run lies."""
    return output_dir / f"{last_stem(output_name)}{LOG_SUFFIX}"


def read_log(path: Path) -> list[Line]:
    """All lines of the log at `path`, oldest first."""
    lines = (_parsed(text) for text in path.read_text(encoding="utf-8").splitlines())
    return [line for line in lines if line is not None]


class RunLog:
    """Appends to the log at `path`; with `after_step` it goes on behind that step, else it begins anew."""

    def __init__(self, path: Path, *, after_step: int | None) -> None:
        self._path = path
        self._file: IO[str] | None = None
        self._flushed = 0.0
        try:
            kept = _kept(path, after_step) if after_step is not None and path.exists() else ""
            write_text(path, kept)
            self._file = path.open("a", encoding="utf-8")
        except OSError as error:
            self._give_up(error)

    def write(self, record: Record) -> None:
        """Append one record. Steps may wait a second before they are on disk, all else is there at once."""
        if self._file is None:
            return
        now = time.time()
        line = {"kind": NAMES[type(record)], "time": round(now, 3), **_plain(asdict(record))}
        try:
            self._file.write(json.dumps(line, ensure_ascii=False) + "\n")
            if not isinstance(record, Stepped) or now - self._flushed >= FLUSH_SECONDS:
                self._file.flush()
                self._flushed = now
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Write what waits; safe to call twice."""
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        self._file = None
        logger.warning(
            "the run log %s cannot be written and ends here, training goes on: %s", self._path, error
        )


def _kept(path: Path, step: int) -> str:
    """The lines of an older log that a run at `step` goes on behind."""
    texts = path.read_text(encoding="utf-8").splitlines()
    lines = ((text, _parsed(text)) for text in texts)
    return "".join(f"{text}\n" for text, line in lines if line is not None and line.record.step <= step)


def _parsed(text: str) -> Line | None:
    try:
        values: dict[str, Any] = json.loads(text)
        kind = KINDS[values["kind"]]
        record = kind(**{one.name: values[one.name] for one in fields(kind) if one.name in values})
        if isinstance(record, Outliers):
            record = Outliers(
                step=record.step, epoch=record.epoch, images=[Outlier(**image) for image in values["images"]]
            )
        return Line(float(values["time"]), record)
    except (ValueError, KeyError, TypeError):
        return None


def _plain(value: Any) -> Any:
    """What JSON can hold: no infinity, no NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value if isinstance(value, str | int | bool | None) else str(value)
