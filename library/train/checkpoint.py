"""Writing and reading the state of a run: independent of rank count and backend, whole or not there at all.

A state is a folder named as Kohya names it:

    <stem>-state/model.safetensors       the network's parameters and buffers, as trained
                 optimizer.safetensors   the optimizer's tensors, "<parameter name>/<key>"
                 extras.safetensors      what else is remembered, "<what>/<name>": the average, losses by picture
                 train_state.json        position, schedule, the optimizer's plain values
                 manifest.json           SHA-256 of the other files, written last

It is made under a temporary name, synced, and renamed, and removed under such a name. A folder whose manifest does not
match is not a state. What a killed run leaves under temporary names goes when the next run of its output begins.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from library.errors import CheckpointError
from library.files.atomic import clear_abandoned, current_umask, fsync, stands_for, temporary_folder
from library.files.hashes import file_sha256
from library.train.naming import WORKFLOW_SUFFIX, is_stem
from library.train.state import STATE_VERSION, TrainState

logger = logging.getLogger(__name__)

STATE_SUFFIX = "-state"
OLD_SUFFIX = ".old"  # of a state that a new one of its name replaces at this moment
MANIFEST = "manifest.json"
# Files of an accelerate state, as sd-scripts writes it; the last is a folder, under DeepSpeed.
FOREIGN_STATE = ("optimizer.bin", "scheduler.bin", "random_states_0.pkl", "pytorch_model")
MODEL, OPTIMIZER, TRAIN_STATE = "model.safetensors", "optimizer.safetensors", "train_state.json"
EXTRAS = "extras.safetensors"  # a state of a run that had none lacks it


@dataclass(frozen=True, slots=True)
class SavedRun:
    """Everything a state folder holds."""

    state: TrainState
    network: Mapping[str, Tensor]
    optimizer_tensors: Mapping[str, Tensor]
    optimizer_values: Mapping[str, Any]
    schedule: object
    extras: Mapping[str, Tensor] = field(default_factory=dict)


def save_run(folder: Path, run: SavedRun) -> None:
    """Write `run` as the state folder `folder`, replacing an older one of that name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_folder(folder)
    try:
        temporary.chmod(0o777 & ~current_umask())
        save_file({k: v.contiguous() for k, v in run.network.items()}, temporary / MODEL)
        save_file({k: v.contiguous() for k, v in run.optimizer_tensors.items()}, temporary / OPTIMIZER)
        values = {**run.state.to_json(), "optimizer": run.optimizer_values, "schedule": run.schedule}
        (temporary / TRAIN_STATE).write_text(json.dumps(values, indent=1), encoding="utf-8")
        if run.extras:
            save_file({k: v.contiguous() for k, v in run.extras.items()}, temporary / EXTRAS)
        manifest = {file.name: file_sha256(file) for file in sorted(temporary.iterdir())}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            file.chmod(0o666 & ~current_umask())  # safetensors writes for the owner alone
            fsync(file)
        fsync(temporary)
        _swap(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def remove_run(folder: Path) -> None:
    """Remove a state folder; killed meanwhile, it is not left as half a state."""
    temporary = temporary_folder(folder)
    folder.rename(temporary / folder.name)
    shutil.rmtree(temporary)


def clear_leftovers(output_dir: Path, output_name: str | None) -> None:
    """Remove what runs of this output left half written or half removed when they were killed."""
    for temporary in output_dir.glob(".*.tmp"):
        name = stands_for(temporary) or ""
        ending = next(
            (one for one in (STATE_SUFFIX, WORKFLOW_SUFFIX) if name.endswith(one)), Path(name).suffix
        )
        stem = name.removesuffix(ending)
        if is_stem(stem, output_name):
            shutil.rmtree(temporary, ignore_errors=True)
    clear_abandoned(output_dir, "")  # averages, the best, reports: names that could be another run's
    for aside in output_dir.glob(f"*{STATE_SUFFIX}{OLD_SUFFIX}"):
        successor = aside.with_name(aside.name.removesuffix(OLD_SUFFIX))
        if _is_state_of(aside.name, output_name) and successor.exists():
            shutil.rmtree(aside, ignore_errors=True)


def load_run(folder: Path) -> SavedRun:
    """Read a state folder. CheckpointError says what is missing or damaged."""
    problem = what_is_wrong(folder)
    if problem:
        raise CheckpointError(f"--resume {folder}: {problem}")
    values = json.loads((folder / TRAIN_STATE).read_text(encoding="utf-8"))
    if values["version"] != STATE_VERSION:
        raise CheckpointError(
            f"--resume {folder}: it is a state of version {values['version']}, this program reads {STATE_VERSION}; "
            "go on with the program that wrote it"
        )
    return SavedRun(
        state=TrainState.from_json(values),
        network=_load(folder / MODEL),
        optimizer_tensors=_load(folder / OPTIMIZER),
        optimizer_values=values["optimizer"],
        schedule=values["schedule"],
        extras=_load(folder / EXTRAS) if (folder / EXTRAS).is_file() else {},
    )


def what_is_wrong(folder: Path) -> str | None:
    """Why `folder` cannot be resumed from, in words; None if it can."""
    if not folder.is_dir():
        return "there is no such folder; give a folder ending in -state, or `auto`"
    if not (folder / MANIFEST).is_file():
        if any((folder / name).exists() for name in FOREIGN_STATE):
            return _how_to_go_on_from_kohya(folder)
        return f"it has no {MANIFEST}, so it is not a whole state"
    try:
        manifest: dict[str, str] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except ValueError:
        return f"its {MANIFEST} is damaged; take an older state"
    for name, expected in manifest.items():
        if not (folder / name).is_file() or file_sha256(folder / name) != expected:
            return f"its file {name} is damaged; take an older state"
    return None


def _how_to_go_on_from_kohya(folder: Path) -> str:
    """Its LoRA and its step can be taken over by options of their own."""
    adapter = folder.with_name(f"{folder.name.removesuffix(STATE_SUFFIX)}.safetensors")
    weights = adapter if adapter.is_file() else folder / MODEL
    try:
        values = json.loads((folder / TRAIN_STATE).read_text(encoding="utf-8"))
        step = f" and initial_step = {int(values['current_step'])}"
    except (OSError, ValueError, KeyError, TypeError):
        step = ""
    return (
        "this is a state of sd-scripts, whose optimizer cannot be taken over; instead of resume set "
        f'network_weights = "{weights}"{step}'
    )


def newest_run(output_dir: Path, output_name: str | None) -> Path | None:
    """The whole state of this output with the most steps done; None if there is none. Damaged ones are named."""
    folders = [
        folder for folder in output_dir.glob(f"*{STATE_SUFFIX}*") if _is_state_of(folder.name, output_name)
    ]
    for folder in sorted(folders, key=_steps_done, reverse=True):
        problem = what_is_wrong(folder)
        if problem is None:
            return folder
        logger.warning("not resuming from %s: %s", folder, problem)
    return None


def _is_state_of(name: str, output_name: str | None) -> bool:
    """Whether a folder called `name` is a state of this output, or one moved aside, and not of another's."""
    stem = name.removesuffix(OLD_SUFFIX)
    return stem.endswith(STATE_SUFFIX) and is_stem(stem.removesuffix(STATE_SUFFIX), output_name)


def _steps_done(folder: Path) -> tuple[int, bool, str]:
    """Steps that a state says it has done, -1 if it cannot be read; of two with as many, one moved aside is less."""
    try:
        step = int(json.loads((folder / TRAIN_STATE).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError):
        step = -1
    return step, not folder.name.endswith(OLD_SUFFIX), folder.name


def _load(path: Path) -> dict[str, Tensor]:
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping


def _swap(new: Path, target: Path) -> None:
    """Rename `new` onto `target`; an old target is moved aside first, under a name that resume still finds."""
    aside = target.with_name(f"{target.name}{OLD_SUFFIX}")
    if target.exists():
        shutil.rmtree(aside, ignore_errors=True)
        target.rename(aside)
    new.rename(target)
    fsync(target.parent)
    shutil.rmtree(aside, ignore_errors=True)
