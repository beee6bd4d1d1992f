"""[logging] The console and the trackers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.config.options import Limit, option


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggingConfig:
    """Console and trackers."""

    logging_dir: Path | None = option(None, "folder for logs; given alone it turns TensorBoard on")
    log_with: str | None = option(
        None,
        "where metrics and sample images go; wandb needs the package of that name",
        choices=("tensorboard", "wandb", "all"),
        unset=("none",),
    )
    log_prefix: str | None = option(None, "text before the date in the name of the log folder")
    log_tracker_name: str | None = option(
        None, "name of the TensorBoard run and of the wandb project; unset is network_train"
    )
    log_config: bool = option(False, "log the options too, without secrets and local paths")
    log_tracker_config: Path | None = option(
        None, "TOML file with [wandb] arguments of wandb.init and [tensorboard] of SummaryWriter"
    )
    wandb_run_name: str | None = option(None, "name of the run in Weights & Biases")
    wandb_api_key: str | None = option(
        None, "key for Weights & Biases; `wandb login` or WANDB_API_KEY is safer"
    )
    console_log_level: str | None = option(
        None,
        "least important messages shown; unset is INFO",
        choices=("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"),
    )
    console_log_file: Path | None = option(None, "file that messages are written to as well")
    console_log_simple: bool = option(False, "plain messages without colour")
    no_run_log: bool = option(
        False, "write no <output_name>-log.jsonl, which has the numbers and events of the run", ours=True
    )
    report_every_n_steps: int = option(
        50,
        "write <output_name>.report.html, a page on the run, again every n steps, and when something is saved, "
        "drawn or validated; 0 writes none",
        limit=Limit(ge=0, unit="steps"),
        ours=True,
    )
