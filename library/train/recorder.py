"""What listeners write into the run log: every step, validations, sample images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from PIL.Image import Image

from library.config.prompts import SamplePrompt
from library.train.best import is_best
from library.train.reading import peak_gb
from library.train.run_log import Sampled, Stepped, Validated, Write
from library.train.state import TrainState
from library.train.trainer import DATA, PASSES, StepReport
from library.train.validate import Validation


class StepRecorder:
    """Writes a line for every step. Of one rank."""

    def __init__(self, record: Write) -> None:
        self._record = record

    def on_start(self, state: TrainState) -> TrainState:
        return state

    def wants_weights(self, step: int) -> bool:
        """Never: it writes numbers."""
        del step
        return False

    def on_step(self, state: TrainState, report: StepReport) -> TrainState:
        self._record(
            Stepped(
                step=state.step,
                epoch=state.epochs_begun,
                loss=report.loss,
                average_loss=state.average_loss,
                learning_rates=report.learning_rates,
                grad_norm=report.grad_norm,
                seconds=report.seconds,
                images_per_second=report.samples / report.seconds,
                memory_gb=peak_gb(),
                skipped=report.skipped,
                data_seconds=report.laps.get(DATA),
                forward_backward_seconds=report.laps.get(PASSES),
            )
        )
        return state

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState:
        del epoch
        return state

    def on_end(self, state: TrainState) -> TrainState:
        return state


def record_validation(record: Write) -> Callable[[TrainState, Validation], None]:
    """What a validation tells its numbers to."""

    def tell(state: TrainState, measured: Validation) -> None:
        record(
            Validated(
                step=state.step,
                loss=measured.loss,
                by_timestep={f"{t:g}": loss for t, loss in measured.by_timestep.items()},
                best=is_best(state.validation_losses),
            )
        )

    return tell


def record_image(
    record: Write, *, output_dir: Path
) -> Callable[[SamplePrompt, Path, Image, TrainState], None]:
    """What a preview tells its pictures to."""

    def tell(prompt: SamplePrompt, path: Path, image: Image, state: TrainState) -> None:
        del image
        file = path.relative_to(output_dir).as_posix()
        record(Sampled(step=state.step, prompt_number=prompt.index, prompt=prompt.prompt, file=file))

    return tell
