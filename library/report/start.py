"""The live report of a job."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from library.errors import ConfigError
from library.report.content import Json, Known, prompts_content
from library.report.dataset import data_content, outliers_content
from library.report.live import LiveReport
from library.report.memory import MemoryMeter
from library.report.page import content_of
from library.report.paths import report_path
from library.train.build import Job
from library.train.metrics import secret_values
from library.train.naming import last_stem
from library.train.run_log import Line


def live_report(job: Job, earlier: Sequence[Line]) -> LiveReport:
    """The report of `job`, begun; `earlier` is the log of what the run did before it was resumed."""
    saving = job.config.saving
    assert saving.output_dir is not None, "checked by the config rules"
    path = report_path(saving.output_dir, saving.output_name)
    resumed = job.saved is not None
    meter = MemoryMeter()
    job = replace(job, saved=None)  # which need not stay in memory
    return LiveReport(
        path, lambda: _known(job, meter, path if resumed else None),
        every=job.config.logging.report_every_n_steps, earlier=earlier, on_step=meter.look,
    )  # fmt: skip


def _known(job: Job, meter: MemoryMeter, before: Path | None) -> Known:
    """All that is known at the start; `before` is the report of the run up to where it is resumed."""
    saving, told, training = job.config.saving, job.told, job.data.training
    assert saving.output_dir is not None, "checked by the config rules"
    return Known(
        name=last_stem(saving.output_name),
        folder=saving.output_dir,
        output_name=saving.output_name,
        options=told.options if told is not None else (),
        notices=told.notices if told is not None else (),
        secrets=secret_values(job.config),
        prompts=prompts_content(job.prompts),
        data=data_content(told.forecast, training) if told is not None else None,
        outliers=lambda found: outliers_content(found, training),
        memory=meter.rows,
        sheets=_sheets(before),
        since=job.state.started_at,
    )


def _sheets(report: Path | None) -> Sequence[Json]:
    """Contact sheets that an earlier report of the run was given."""
    try:
        found: Sequence[Json] = content_of(report).get("sheets", ()) if report is not None else ()
    except ConfigError:
        return ()
    return found
