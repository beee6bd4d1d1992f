"""[logging] The console and the trackers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.config.options import no_effect, option, refused_values

ONLY_TENSORBOARD = 'only tensorboard is available in this version: set log_with = "tensorboard"'
NO_WANDB = no_effect("only tensorboard is available in this version, nothing is sent to Weights & Biases")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """Console and trackers."""

    logging_dir: Path | None = option(None, "folder for TensorBoard logs; given alone it turns them on")
    log_with: str | None = option(
        None,
        "where metrics go",
        choices=("tensorboard", "wandb", "all"),
        effect=refused_values({"wandb": ONLY_TENSORBOARD, "all": ONLY_TENSORBOARD}),
        unset=("none",),
    )
    log_prefix: str | None = option(None, "text before the date in the name of the log folder")
    log_tracker_name: str | None = option(None, "name of the tracker's run")
    log_config: bool = option(False, "log the options too")
    log_tracker_config: Path | None = option(
        None,
        "file with the tracker's own settings",
        effect=no_effect("TensorBoard needs no settings of its own"),
    )
    wandb_run_name: str | None = option(None, "name of the run in Weights & Biases", effect=NO_WANDB)
    wandb_api_key: str | None = option(None, "key for Weights & Biases", effect=NO_WANDB)
    console_log_level: str | None = option(
        None,
        "least important messages shown; unset is INFO",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: Path | None = option(None, "file that messages are written to as well")
    console_log_simple: bool = option(False, "plain messages without colour")
