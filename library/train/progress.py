"""What the person at the screen sees while a run goes on: a bar on a terminal, lines in a log file."""

from __future__ import annotations

import logging
import time
from collections import deque

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column

from library.train.reading import peak_gb
from library.train.state import TrainState
from library.train.trainer import StepReport

logger = logging.getLogger(__name__)

WINDOW = 20  # steps that speed is averaged over
LINES_PER_RUN = 20  # lines printed over a run when the screen is not a terminal


class ProgressListener:
    """One bar: steps, epoch, loss average, seconds a step, images a second, time left, memory."""

    def __init__(self, *, console: Console, total_steps: int, num_epochs: int) -> None:
        self._console = console
        self._total = total_steps
        self._epochs = num_epochs
        self._recent: deque[tuple[float, int]] = deque(maxlen=WINDOW)
        self._bar: Progress | None = None
        self._task = TaskID(0)
        self._last_line = 0.0

    def on_start(self, state: TrainState) -> TrainState:
        if self._console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=None),
                MofNCompleteColumn(table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[numbers]}", table_column=Column(no_wrap=True)),
                TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True)),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task(
                "steps", total=self._total, completed=state.step, numbers="starting"
            )
            self._bar.start()
        return state

    def wants_weights(self, step: int) -> bool:
        """Never: it shows numbers."""
        del step
        return False

    def on_step(self, state: TrainState, report: StepReport) -> TrainState:
        self._recent.append((report.seconds, report.samples))
        if self._bar is not None:
            self._bar.update(self._task, completed=state.step, numbers=self._numbers(state))
        elif state.step == 1 or state.step % -(-self._total // LINES_PER_RUN) == 0 or self._is_late():
            self._last_line = time.monotonic()
            logger.info("step %d/%d  %s", state.step, self._total, self._numbers(state))
        return state

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState:
        del epoch
        return state

    def on_end(self, state: TrainState) -> TrainState:
        self.close()
        return state

    def close(self) -> None:
        """Leave the terminal as it was; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _is_late(self) -> bool:
        return time.monotonic() - self._last_line > 60

    def _numbers(self, state: TrainState) -> str:
        seconds, samples = (sum(column) for column in zip(*self._recent, strict=True))
        epoch = min(self._epochs, (state.step - 1) // state.steps_per_epoch + 1)
        parts = [
            f"epoch {epoch}/{self._epochs}",
            f"avr_loss={state.average_loss:.4f}",
            f"{seconds / len(self._recent):.2f} s/step",
            f"{samples / seconds:.1f} img/s",
        ]
        if (peak := peak_gb()) is not None:
            parts.append(f"{peak:.1f} GB peak")
        return "  ".join(parts)
