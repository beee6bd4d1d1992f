"""Kohya's names of what a run writes, and which old ones a new one retires. Pure functions of options and numbers.

Source: spec of sd-scripts, "Saving, state, resume".
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from library.config.prompts import SamplePrompt
from library.config.sections.saving import SavingConfig

WORKFLOW_SUFFIX = ".workflow.json"


@dataclass(frozen=True, slots=True)
class SavePoint:
    """One moment of saving: the files' common stem, and the stems it retires (None: keeps all)."""

    stem: str
    retires_model: str | None = None
    retires_state: str | None = None


def epoch_stem(output_name: str | None, epoch: int) -> str:
    """Stem of what is written at the end of `epoch` (1-based)."""
    return f"{output_name or 'epoch'}-{epoch:06d}"


def step_stem(output_name: str | None, step: int) -> str:
    """Stem of what is written after optimizer step `step` (1-based)."""
    return f"{output_name or 'at'}-step{step:08d}"


def last_stem(output_name: str | None) -> str:
    """Stem of what is written at the end of the run."""
    return output_name or "last"


def average_stem(stem: str) -> str:
    """Stem of the averaged weights beside those written under `stem`."""
    return f"{stem}-ema"


def best_stem(output_name: str | None) -> str:
    """Stem of the weights with the lowest validation loss."""
    return f"{last_stem(output_name)}-best"


def model_path(config: SavingConfig, stem: str) -> Path:
    """Where the network file of that stem goes."""
    assert config.output_dir is not None, "checked by the config rules"
    return config.output_dir / f"{stem}.{config.save_model_as or 'safetensors'}"


def workflow_path(network_file: Path) -> Path:
    """Where the ComfyUI workflow of a network file goes: beside it."""
    return network_file.with_name(f"{network_file.stem}{WORKFLOW_SUFFIX}")


def card_path(config: SavingConfig) -> Path:
    """Where the model card of a run goes."""
    assert config.output_dir is not None, "checked by the config rules"
    return config.output_dir / f"{last_stem(config.output_name)}.md"


def picture_name(
    prompt: SamplePrompt, *, output_name: str | None, epoch: int | None, step: int, when: datetime
) -> str:
    """Kohya's name in <output_dir>/sample of a picture drawn at the end of `epoch`, or else after optimizer `step`."""
    seed = "" if prompt.seed is None else f"_{prompt.seed}"
    start = picture_start(output_name, epoch=epoch, step=step)
    return f"{start}_{prompt.index:02d}_{when:%Y%m%d%H%M%S}{seed}.png"


def picture_start(output_name: str | None, *, epoch: int | None, step: int) -> str:
    """What the names of all pictures of one moment begin with."""
    place = f"{step:06d}" if epoch is None else f"e{epoch:06d}"
    return f"{output_name}_{place}" if output_name else place


def is_stem(stem: str, output_name: str | None) -> bool:
    """Whether a run of this output_name writes under that stem: "lora-v2" is none of "lora"."""
    pattern = r"epoch-\d{6,}|at-step\d{8,}|last"
    if output_name:
        pattern = re.escape(output_name) + r"(-\d{6,}|-step\d{8,})?"
    return re.fullmatch(pattern, stem) is not None


def save_every_n_epochs(config: SavingConfig, num_epochs: int) -> int | None:
    """The epoch interval; `save_n_epoch_ratio` r asks for about r files over the run."""
    if config.save_n_epoch_ratio:
        return num_epochs // config.save_n_epoch_ratio or 1
    return config.save_every_n_epochs


def epoch_save(config: SavingConfig, *, epoch: int, num_epochs: int) -> SavePoint | None:
    """What the end of `epoch` saves. The last epoch saves nothing here: the final file is it."""
    every = save_every_n_epochs(config, num_epochs)
    if not every or epoch % every or epoch >= num_epochs:
        return None
    return SavePoint(
        epoch_stem(config.output_name, epoch),
        _retired_epoch(config.output_name, epoch, every, config.save_last_n_epochs),
        _retired_epoch(
            config.output_name, epoch, every, config.save_last_n_epochs_state or config.save_last_n_epochs
        ),
    )


def step_save(config: SavingConfig, *, step: int) -> SavePoint | None:
    """What optimizer step `step` saves."""
    every = config.save_every_n_steps
    if not every or step % every:
        return None
    return SavePoint(
        step_stem(config.output_name, step),
        _retired_step(config.output_name, step, every, config.save_last_n_steps, least=0),
        _retired_step(
            config.output_name,
            step,
            every,
            config.save_last_n_steps_state or config.save_last_n_steps,
            least=1,
        ),
    )


def saved_at(
    config: SavingConfig, *, step: int, steps_per_epoch: int, num_epochs: int, total_steps: int
) -> str | None:
    """Stem of the network file that is written after optimizer `step`; None if none is."""
    if step >= total_steps:
        return last_stem(config.output_name)
    point = step_save(config, step=step)
    if point is None and step and step % steps_per_epoch == 0:
        point = epoch_save(config, epoch=step // steps_per_epoch, num_epochs=num_epochs)
    return point.stem if step and point else None


def _retired_epoch(name: str | None, epoch: int, every: int, keep: int | None) -> str | None:
    if not keep:
        return None
    retired = epoch - every * keep
    return epoch_stem(name, retired) if retired >= 0 else None


def _retired_step(name: str | None, step: int, every: int, keep: int | None, *, least: int) -> str | None:
    """`keep` counts steps, not files: every 10 and keep 30 removes step 10 at step 50."""
    if not keep:
        return None
    retired = step - keep - 1
    retired -= retired % every
    return step_stem(name, retired) if retired >= least else None
