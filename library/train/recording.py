"""What a job records: its log and its report, opened before anything is built, told how the run ended."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Protocol

import torch

from library.config.train_config import OPTIONS, TrainConfig
from library.errors import Interrupted
from library.log import ROOT
from library.train.build import Job
from library.train.metrics import public_options
from library.train.run_log import Ended, Line, Record, RunLog, Started, Warned, Write, log_path, read_log
from library.train.spent import Spent

logger = logging.getLogger(__name__)


class Taker(Protocol):
    """Something that takes what is recorded. Neither method raises."""

    def write(self, record: Record) -> None: ...

    def close(self) -> None: ...


@contextmanager
def recorded(job: Job, report: Callable[[Job, Sequence[Line]], Taker], spent: Spent) -> Iterator[Write]:
    """What writes into the run log and the report of `job`; into nothing on other ranks.

    `report` begins a report that goes on behind the lines of the run so far. On leaving by an error its end is
    written. The end of a run that is done is for the caller to write. `spent` is told of every record.
    """
    if not job.backend.world.is_main:
        yield lambda record: None
        return
    log = _Takers(job, report)
    step, started = job.state.step, _started(job)
    del job  # it holds the state that is resumed, which need not stay in memory

    def write(record: Record) -> None:
        nonlocal step
        step = record.step
        spent.add(Line(time.time(), record))
        log.write(record)

    warnings = _Warnings(lambda record: log.write(_warned(record, step)))
    logging.getLogger(ROOT).addHandler(warnings)
    try:
        write(started)
        yield write
    except BaseException as error:
        why = "stopped" if isinstance(error, Interrupted) else "error"
        log.write(Ended(step=step, why=why, message=str(error) or type(error).__name__))
        raise
    finally:
        logging.getLogger(ROOT).removeHandler(warnings)
        log.close()
        if advice := spent.advice():
            logger.info("%s", advice)


class _Takers:
    """The run log and the report, where they are wanted."""

    def __init__(self, job: Job, report: Callable[[Job, Sequence[Line]], Taker]) -> None:
        config, earlier = job.config, list[Line]()
        assert config.saving.output_dir is not None, "checked by the config rules"
        path = log_path(config.saving.output_dir, config.saving.output_name)
        self._takers: list[Taker] = []
        if not config.logging.no_run_log:
            self._takers.append(RunLog(path, after_step=job.state.step if job.saved is not None else None))
            earlier = read_log(path) if path.is_file() else []
        if config.logging.report_every_n_steps:
            self._takers.append(report(job, earlier))

    def write(self, record: Record) -> None:
        """Hand one record to all."""
        for taker in self._takers:
            taker.write(record)

    def close(self) -> None:
        """Finish the log and the report."""
        for taker in self._takers:
            taker.close()


class _Warnings(logging.Handler):
    """Hands warnings and errors on."""

    def __init__(self, tell: Callable[[logging.LogRecord], None]) -> None:
        super().__init__(logging.WARNING)
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell(record)


def _warned(record: logging.LogRecord, step: int) -> Warned:
    return Warned(step=step, level=record.levelname, message=record.getMessage())


def _started(job: Job) -> Started:
    data, plan, device = job.data, job.data.plan, job.backend.world.device
    return Started(
        step=job.state.step,
        total_steps=plan.total_steps,
        num_epochs=plan.num_epochs,
        steps_per_epoch=plan.steps_per_epoch,
        resumed=job.saved is not None,
        num_ranks=job.backend.world.size,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        num_images=len(data.training.records),
        num_validation_images=len(data.discovered.validation),
        options=_changed(job.config),
        start_seconds=job.clock.seconds,
    )


def _changed(config: TrainConfig) -> Mapping[str, object]:
    """The public options that were given another value than their default."""
    return {n: v for n, v in public_options(config).items() if v != OPTIONS[n].row.default}
