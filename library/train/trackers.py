"""Where numbers and sample images go: TensorBoard, Weights & Biases, or both.

Source: spec of sd-scripts, "Logging". A tracker that fails (no network, full disk) costs one warning, never the run.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image
from torch.utils.tensorboard import SummaryWriter

from library.config.sections.logging import LoggingConfig
from library.config.toml_file import parse_toml, read_text
from library.errors import ConfigError, EnvironmentUnsupported

logger = logging.getLogger(__name__)

DEFAULT_NAME = "network_train"
TENSORBOARD, WANDB = "tensorboard", "wandb"
OFFLINE_MODES = ("offline", "dryrun", "disabled")
FINISH_SECONDS = (
    120.0  # how long the end of a run waits for Weights & Biases; what is left can be synced later
)


@dataclass(frozen=True, slots=True)
class Moment:
    """When something was measured."""

    x: int  # where it stands in a plot: the optimizer step, for numbers of an epoch the epoch
    step: int  # optimizer steps done
    epoch: int  # from 1


class Tracker(Protocol):
    """One place that keeps what a run reports. Any method may raise."""

    def options(self, values: Mapping[str, object]) -> None: ...

    def scalars(self, values: Mapping[str, float], at: Moment) -> None: ...

    def image(self, tag: str, image: Image, at: Moment) -> None: ...

    def close(self, *, failed: bool) -> None: ...


class TensorBoardTracker:
    """An event file in `folder`; `settings` are further arguments of torch's SummaryWriter."""

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._writer = SummaryWriter(**{"log_dir": str(folder), **settings})

    def options(self, values: Mapping[str, object]) -> None:
        rows = (f"| {name} | {value} |" for name, value in values.items())
        self._writer.add_text("config", "\n".join(("| option | value |", "|---|---|", *rows)))

    def scalars(self, values: Mapping[str, float], at: Moment) -> None:
        for tag, value in values.items():
            self._writer.add_scalar(tag, value, at.x)

    def image(self, tag: str, image: Image, at: Moment) -> None:
        self._writer.add_image(tag, np.asarray(image), at.x, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        del failed
        self._writer.close()


class WandbTracker:
    """One run in Weights & Biases; `settings` are further arguments of wandb.init."""

    def __init__(self, folder: Path | None, settings: Mapping[str, Any]) -> None:
        import wandb  # noqa: PLC0415 - an optional package that takes a second to import

        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            settings = {"dir": str(folder), **settings}
        bounded = {"finish_timeout": FINISH_SECONDS, **settings.get("settings", {})}
        self._picture = wandb.Image
        self._run = wandb.init(**{**settings, "settings": wandb.Settings(**bounded)})
        for name in ("epoch", "global_step"):
            self._run.define_metric(name, hidden=True)

    def options(self, values: Mapping[str, object]) -> None:
        plain = (bool, int, float, str)
        self._run.config.update({k: v if isinstance(v, plain) else str(v) for k, v in values.items()})

    def scalars(self, values: Mapping[str, float], at: Moment) -> None:
        self._run.log({**values, "global_step": at.step, "epoch": at.epoch})

    def image(self, tag: str, image: Image, at: Moment) -> None:
        self._run.log({tag: self._picture(image), "global_step": at.step, "epoch": at.epoch}, commit=False)

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


class CarefulTracker:
    """A tracker that is let go at its first failure, with one warning."""

    def __init__(self, name: str, start: Callable[[], Tracker]) -> None:
        self._name = name
        self._tracker: Tracker | None = None
        self._try(lambda: setattr(self, "_tracker", start()))

    def options(self, values: Mapping[str, object]) -> None:
        self._tell(lambda tracker: tracker.options(values))

    def scalars(self, values: Mapping[str, float], at: Moment) -> None:
        self._tell(lambda tracker: tracker.scalars(values, at))

    def image(self, tag: str, image: Image, at: Moment) -> None:
        self._tell(lambda tracker: tracker.image(tag, image, at))

    def close(self, *, failed: bool) -> None:
        self._tell(lambda tracker: tracker.close(failed=failed))
        self._tracker = None

    def _tell(self, report: Callable[[Tracker], None]) -> None:
        tracker = self._tracker
        if tracker is not None:
            self._try(lambda: report(tracker))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:  # noqa: BLE001 - whatever a tracker raises, training goes on
            self._tracker = None
            reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
            logger.warning("%s failed and gets nothing more, training goes on: %s", self._name, reason)


def wanted(config: LoggingConfig) -> tuple[str, ...]:
    """Names of the trackers that the options ask for; logging_dir alone means TensorBoard."""
    if config.log_with is None:
        return (TENSORBOARD,) if config.logging_dir is not None else ()
    return (TENSORBOARD, WANDB) if config.log_with == "all" else (config.log_with,)


def check(config: LoggingConfig) -> None:
    """Say before anything large is read what a tracker lacks: settings, package, login."""
    settings = tracker_settings(config)
    if WANDB not in wanted(config):
        return
    if importlib.util.find_spec("wandb") is None:
        raise EnvironmentUnsupported(
            f'log_with = "{config.log_with}" needs the package wandb: pip install wandb, '
            'or set log_with = "tensorboard"'
        )
    mode = settings.get(WANDB, {}).get("mode") or os.environ.get("WANDB_MODE")
    if mode not in OFFLINE_MODES and not _logged_in(config):
        raise ConfigError(
            f'log_with = "{config.log_with}" needs a login to Weights & Biases: run `wandb login`, set '
            "WANDB_API_KEY or wandb_api_key, or WANDB_MODE=offline to keep the run on disk"
        )


def tracker_settings(config: LoggingConfig) -> Mapping[str, Mapping[str, Any]]:
    """The tables [tensorboard] and [wandb] of log_tracker_config. ConfigError for others, and for no TOML."""
    path = config.log_tracker_config
    if path is None:
        return {}
    tables = parse_toml(read_text(path), path)
    for name, table in tables.items():
        if name not in (TENSORBOARD, WANDB) or not isinstance(table, dict):
            raise ConfigError(
                f"log_tracker_config {path}: {name!r} is no tracker's table; "
                "write settings under [wandb] or [tensorboard]"
            )
    return tables


def log_folder(logging_dir: Path, log_prefix: str | None) -> Path:
    """`<logging_dir>/<log_prefix><YYYYmmddHHMMSS>`, as Kohya lays it out."""
    return logging_dir / f"{log_prefix or ''}{time.strftime('%Y%m%d%H%M%S')}"


def start_trackers(config: LoggingConfig, *, secrets: Iterable[str]) -> Sequence[Tracker]:
    """The trackers of a run, started. `secrets` are words that nothing may keep."""
    names, settings = wanted(config), tracker_settings(config)
    folder = log_folder(config.logging_dir, config.log_prefix) if config.logging_dir is not None else None
    name = config.log_tracker_name or DEFAULT_NAME
    trackers: list[Tracker] = []
    if TENSORBOARD in names:
        assert folder is not None, "checked by the config rules"
        own = settings.get(TENSORBOARD, {})
        trackers.append(CarefulTracker("TensorBoard", lambda: TensorBoardTracker(folder / name, own)))
    if WANDB in names:
        if config.wandb_api_key is not None:  # wandb.login would write it into a file
            os.environ["WANDB_API_KEY"] = config.wandb_api_key
        hide_in_arguments(secrets)
        chosen = {"project": name, "name": config.wandb_run_name, **settings.get(WANDB, {})}
        trackers.append(CarefulTracker("Weights & Biases", lambda: WandbTracker(folder, chosen)))
    return trackers


def hide_in_arguments(secrets: Iterable[str]) -> None:
    """Mask secrets in sys.argv, which wandb stores with every run."""
    for secret in secrets:
        sys.argv[:] = [word.replace(secret, "***") for word in sys.argv]


def _logged_in(config: LoggingConfig) -> bool:
    if config.wandb_api_key is not None or os.environ.get("WANDB_API_KEY"):
        return True
    import wandb  # noqa: PLC0415 - an optional package that takes a second to import

    return bool(wandb.login(prompt=False, verify=False))
