"""Which old files a save removes, and whether before or after it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from library.config.sections.saving import SavingConfig
from library.train.checkpoint import STATE_SUFFIX, remove_run
from library.train.naming import SavePoint, average_stem, model_path, workflow_path

_SPARE = 1.05  # of what is retired, what the same again takes with whole blocks and a longer header


def state_path(config: SavingConfig, stem: str) -> Path:
    """Where the state of that stem goes."""
    assert config.output_dir is not None, "checked by the config rules"
    return config.output_dir / f"{stem}{STATE_SUFFIX}"


def retired(config: SavingConfig, point: SavePoint) -> Sequence[Path]:
    """The network files and the state that `point` retires and that are there."""
    paths: list[Path] = []
    if point.retires_model:
        stems = (point.retires_model, average_stem(point.retires_model))
        paths += [model_path(config, stem) for stem in stems]
    if point.retires_state and config.save_state:
        paths.append(state_path(config, point.retires_state))
    return [path for path in paths if path.exists()]


def must_go_first(old: Sequence[Path], written: Iterable[Path]) -> bool:
    """Whether the disk of the retired paths `old` has no room for as much again beside them.

    Never where one is the only network file or the only state of those `written`: then the new one has to fit.
    """
    stay = [path for path in written if path not in old and path.exists()]
    if not old or not all(any(path.is_dir() == one.is_dir() for path in stay) for one in old):
        return False
    return shutil.disk_usage(old[0].parent).free < _SPARE * sum(map(_size, old))


def remove(old: Path, release: Callable[[Path], None]) -> None:
    """Remove a state, or a network file and its workflow, each when nobody reads it: `release` waits for that."""
    release(old)
    if old.is_dir():
        remove_run(old)
        return
    old.unlink(missing_ok=True)
    workflow = workflow_path(old)
    release(workflow)
    workflow.unlink(missing_ok=True)


def _size(path: Path) -> int:
    """Bytes of a file, or of all in a folder."""
    return sum(file.stat().st_size for file in (path.rglob("*") if path.is_dir() else [path]))
