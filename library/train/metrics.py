"""What is measured of a run, under Kohya's tags, told to its trackers.

Source: spec of sd-scripts, "Logging". x is the optimizer step, for `*epoch*` tags the epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL.Image import Image

from library.config.options import SECRETS
from library.config.prompts import SamplePrompt
from library.config.train_config import TrainConfig
from library.train.reading import peak_gb
from library.train.spent import SAMPLES, SAVING, VALIDATION, Spent
from library.train.state import TrainState
from library.train.trackers import Moment, Tracker
from library.train.trainer import StepReport
from library.train.validate import Validation

# Kohya keeps secrets and local paths out of what trackers store.
PRIVATE = SECRETS | {
    "pretrained_model_name_or_path", "vae", "tokenizer_cache_dir", "train_data_dir", "conditioning_data_dir",
    "reg_data_dir", "output_dir", "logging_dir",
}  # fmt: skip

OCCASIONS = {
    VALIDATION: "speed/validation_seconds", SAMPLES: "speed/sampling_seconds", SAVING: "speed/saving_seconds",
}  # fmt: skip


def public_options(config: TrainConfig) -> Mapping[str, object]:
    """The options that log_config hands to trackers."""
    return {name: value for name, value in config.flat().items() if name not in PRIVATE}


def secret_values(config: TrainConfig) -> tuple[str, ...]:
    """The words of `config` that nothing may keep."""
    return tuple(str(value) for name in sorted(SECRETS) if (value := config.value(name)))


class MetricsListener:
    """Reports scalars of every step, epoch and validation, and sample images."""

    def __init__(self, trackers: Sequence[Tracker], spent: Spent) -> None:
        self._trackers, self._spent = trackers, spent
        self._told: Mapping[str, float] = {}  # what was told of the time spent
        self._state: TrainState | None = None  # at the last step
        self._validated = 0

    def on_start(self, state: TrainState) -> TrainState:
        self._report_validation(state)
        return state

    def wants_weights(self, step: int) -> bool:
        """Never: one rank has it, and its numbers come with the report."""
        del step
        return False

    def on_step(self, state: TrainState, report: StepReport) -> TrainState:
        scalars = {
            "loss/current": report.loss,
            "loss/average": state.average_loss,
            "norm/grad_norm": report.grad_norm,
            "speed/seconds_per_step": report.seconds,
            "speed/images_per_second": report.samples / report.seconds,
            **{f"lr/{name}": rate for name, rate in report.learning_rates.items()},
            **report.norms,
            **{f"speed/{lap}_seconds": seconds for lap, seconds in report.laps.items()},
            **self._occasions(),
        }
        self._state = state
        if (peak := peak_gb()) is not None:
            scalars["memory/peak_gb"] = peak
        if report.max_norm is not None:
            scalars["max_norm/keys_scaled"] = report.max_norm.scaled
            scalars["max_norm/max_key_norm"] = report.max_norm.maximum
            scalars["norm/avg_key_norm"] = report.max_norm.mean
        self._report(scalars, x=state.step, state=state)
        self._report_validation(state)
        return state

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState:
        self._report({"loss/epoch_average": state.average_loss}, x=epoch, state=state)
        self._report_validation(state)
        if state.validation_losses and state.validation_losses[-1][0] == state.step:
            scalars = _validation("epoch", state.validation_losses[-1][1], state)
            self._report(scalars, x=epoch, state=state)
        return state

    def on_end(self, state: TrainState) -> TrainState:
        return state

    def on_image(self, prompt: SamplePrompt, path: Path, image: Image, state: TrainState) -> None:
        """Report one sample image, which was written to `path`."""
        del path
        for tracker in self._trackers:
            tracker.image(f"sample_{prompt.index}", image, _moment(state.step, state))

    def on_validation(self, state: TrainState, measured: Validation) -> None:
        """Report the losses at single timesteps; their mean is in the state."""
        by_timestep = {f"loss/validation/timestep_{t:g}": loss for t, loss in measured.by_timestep.items()}
        self._report(by_timestep, x=state.step, state=state)

    def close(self, *, failed: bool) -> None:
        """End what trackers hold open; after the last sample was drawn, and when an error ends the run."""
        if self._state is not None:
            self._report(self._occasions(), x=self._state.step, state=self._state)
        for tracker in self._trackers:
            tracker.close(failed=failed)

    def _occasions(self) -> dict[str, float]:
        """Seconds that validation, sample images and saving took since this was asked for."""
        now, before = self._spent.totals(), self._told
        self._told = now
        taken = {tag: now.get(part, 0.0) - before.get(part, 0.0) for part, tag in OCCASIONS.items()}
        return {tag: seconds for tag, seconds in taken.items() if seconds > 0}

    def _report_validation(self, state: TrainState) -> None:
        for step, loss in state.validation_losses[self._validated :]:
            self._report(_validation("step", loss, state), x=step, state=state)
        self._validated = len(state.validation_losses)

    def _report(self, scalars: Mapping[str, float], *, x: int, state: TrainState) -> None:
        for tracker in self._trackers:
            tracker.scalars(scalars, _moment(x, state))


def _validation(kind: str, loss: float, state: TrainState) -> dict[str, float]:
    scalars = {f"loss/validation/{kind}_average": loss}
    if state.losses:  # before the first step there is nothing to diverge from
        scalars[f"loss/validation/{kind}_divergence"] = loss - state.average_loss
    return scalars


def _moment(x: int, state: TrainState) -> Moment:
    return Moment(x=x, step=state.step, epoch=state.epochs_begun)
