"""TensorBoard under Kohya's tags and folder layout.

Source: spec of sd-scripts, "Logging". x is the optimizer step, for `*epoch*` tags the epoch.
"""

from __future__ import annotations

import time
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from library.config.train_config import TrainConfig
from library.train.state import TrainState
from library.train.trainer import StepReport

# Kohya keeps secrets and local paths out of what trackers store.
PRIVATE = frozenset(
    {
        "wandb_api_key", "huggingface_token", "pretrained_model_name_or_path", "vae", "tokenizer_cache_dir",
        "train_data_dir", "conditioning_data_dir", "reg_data_dir", "output_dir", "logging_dir",
    }
)  # fmt: skip


def log_folder(logging_dir: Path, log_prefix: str | None, tracker_name: str | None) -> Path:
    """`<logging_dir>/<log_prefix><YYYYmmddHHMMSS>/<tracker name>`, as Kohya lays it out."""
    return (
        logging_dir / f"{log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}" / (tracker_name or "network_train")
    )


class TensorBoardListener:
    """Writes scalars for every step, epoch and validation."""

    def __init__(self, folder: Path, config: TrainConfig | None) -> None:
        self._writer = SummaryWriter(str(folder))
        self._validated = 0
        if config is not None:  # log_config
            rows = (f"| {name} | {value} |" for name, value in config.flat().items() if name not in PRIVATE)
            self._writer.add_text("config", "\n".join(("| option | value |", "|---|---|", *rows)))

    def on_start(self, state: TrainState) -> TrainState:
        self._write_validation(state)
        return state

    def on_step(self, state: TrainState, report: StepReport) -> TrainState:
        scalars = {
            "loss/current": report.loss,
            "loss/average": state.average_loss,
            "norm/grad_norm": report.grad_norm,
            "speed/seconds_per_step": report.seconds,
            "speed/images_per_second": report.samples / report.seconds,
            **{f"lr/{name}": rate for name, rate in report.learning_rates.items()},
        }
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, state.step)
        self._write_validation(state)
        return state

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState:
        self._writer.add_scalar("loss/epoch_average", state.average_loss, epoch)
        self._write_validation(state)
        return state

    def on_end(self, state: TrainState) -> TrainState:
        self._writer.close()
        return state

    def _write_validation(self, state: TrainState) -> None:
        for step, loss in state.validation_losses[self._validated :]:
            self._writer.add_scalar("loss/validation/step_average", loss, step)
            self._writer.add_scalar("loss/validation/step_divergence", loss - state.average_loss, step)
        self._validated = len(state.validation_losses)
