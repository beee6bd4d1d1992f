"""When the network and the state are written, and which old files go."""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from library.config.sections.saving import SavingConfig
from library.distributed.base import Backend
from library.errors import WriteFailed
from library.files.atomic import write_text
from library.files.refusals import refusals_named
from library.optim.factory import BuiltOptimizer
from library.train.checkpoint import STATE_SUFFIX, SavedRun, save_run
from library.train.naming import (
    SavePoint,
    epoch_save,
    last_stem,
    model_path,
    step_save,
    step_stem,
    workflow_path,
)
from library.train.state import TrainState
from library.train.trainer import StepReport
from library.train.upload import Uploader
from networks.interface import NetworkHandle
from networks.readback import read_back

logger = logging.getLogger(__name__)

SAVE_DTYPES: dict[str | None, torch.dtype | None] = {
    None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class About:
    """What is said of a network file: in its header, and in the ComfyUI workflow beside it (None: there is none)."""

    metadata: Callable[[TrainState, int], Mapping[str, str]]
    workflow: Callable[[Path], Mapping[str, Any]] | None = None


class Saver:
    """Writes model files and state folders. Every rank calls it and gives what it holds; rank 0 writes."""

    def __init__(
        self,
        *,
        config: SavingConfig,
        network: NetworkHandle,
        about: About,
        capture: Callable[[TrainState], SavedRun],
        backend: Backend,
        optimizer: BuiltOptimizer,
        uploader: Uploader | None = None,
    ) -> None:
        self._optimizer, self._about, self.uploader = optimizer, about, uploader
        assert config.output_dir is not None, "checked by the config rules"
        self._config, self._folder, self._network = config, config.output_dir, network
        self._capture = capture
        self._backend, self._world = backend, backend.world
        self.written: list[Path] = []
        self.saves = 0  # network files written
        self.newest: Path | None = None  # the network file written last
        self.readers = ""  # the programs that load it
        self._checked = False  # whether it was said that a file was read back and is whole

    def model(self, stem: str, state: TrainState, *, epoch: int, final: bool = False) -> Path:
        """Write the network as `<stem>.<save_model_as>`; `epoch` is what ss_epoch says."""
        path = model_path(self._config, stem)
        with self._optimizer.evaluating(), self._backend.whole(self._network.module):
            start = time.perf_counter()
            if self._world.is_main:
                dtype = SAVE_DTYPES[self._config.save_precision]
                with refusals_named(path):
                    self._network.save(path, dtype=dtype, metadata=self._about.metadata(state, epoch))
        if self._world.is_main:
            seconds = time.perf_counter() - start
            logger.info("saved %s (%.1f MB, %.1f s)", path, path.stat().st_size / 1e6, seconds)
            self._check(path)
            self.written.append(path)
            self.saves, self.newest = self.saves + 1, path
            self._write_workflow(path)
            if self.uploader is not None:
                self.uploader.put(path, now=final)
        return path

    def _write_workflow(self, path: Path) -> None:
        """Write the ComfyUI workflow of a network file beside it."""
        if self._about.workflow is None:
            return
        target = workflow_path(path)
        try:
            with refusals_named(target):
                write_text(target, json.dumps(self._about.workflow(path), indent=1) + "\n")
        except WriteFailed as error:
            logger.warning("%s The network file is whole", error)
            return
        if self.uploader is not None:
            self.uploader.put(target)

    def _check(self, path: Path) -> None:
        """Read the file as a stranger would; what is wrong is said each time, that all is well once."""
        report = read_back(path)
        self.readers = report.readers
        for problem in report.problems:
            logger.warning("%s: %s", path.name, problem)
        if not report.problems and not self._checked:
            acting = report.num_layers - report.num_silent
            logger.info(
                "read back: %d layers under names that %s load, all numbers finite, %d of them act",
                report.num_layers, report.readers, acting,
            )  # fmt: skip
            self._checked = True

    def state(self, stem: str, state: TrainState) -> Path:
        """Write the state folder `<stem>-state`, with the weights that steps are taken from."""
        folder = self._folder / f"{stem}{STATE_SUFFIX}"
        run = self._capture(state)
        if self._world.is_main:
            with refusals_named(folder):
                save_run(folder, run)
            logger.info("saved the state in %s", folder)
            self.written.append(folder)
            if self.uploader is not None and self._config.save_state_to_huggingface:
                self.uploader.put(folder)
        return folder

    def interrupted(self, state: TrainState) -> Path:
        """Write the state of a run that was asked to stop."""
        return self.state(step_stem(self._config.output_name, state.step), state)

    def at(self, point: SavePoint, state: TrainState, *, epoch: int) -> None:
        """Write what is due at `point`, then remove what it retires.

        A disk that refuses ends no training: the next point tries again, and what is there stays.
        """
        written = self._tried(lambda: self.model(point.stem, state, epoch=epoch))
        if self._config.save_state:
            # Tried as well where the first failed: other ranks take part in it.
            written = self._tried(lambda: self.state(point.stem, state)) and written
        if self._world.is_main and written:
            self._retire(point)

    def _tried(self, write: Callable[[], Path]) -> bool:
        try:
            write()
        except WriteFailed as error:
            logger.error("%s Training goes on; nothing older is removed", error)
            return False
        return True

    def final(self, state: TrainState, *, epoch: int) -> Path:
        """Write the finished network, and the last state if asked."""
        path = self.model(last_stem(self._config.output_name), state, epoch=epoch, final=True)
        if self._config.save_state or self._config.save_state_on_train_end:
            self.state(last_stem(self._config.output_name), state)
        return path

    def finish(self) -> None:
        """Wait, not for ever, until everything is uploaded."""
        if self.uploader is not None:
            self.uploader.finish()

    def failed(self) -> None:
        """An error ends the run: say what is left of it, and upload that."""
        for what, kept in (("network file", Path.is_file), ("state", Path.is_dir)):
            paths = [path for path in self.written if kept(path)]
            if paths:
                logger.info("the last whole %s is %s", what, paths[-1])
        self.finish()

    def _retire(self, point: SavePoint) -> None:
        if point.retires_model:
            old = model_path(self._config, point.retires_model)
            if old.exists():
                for path in (old, workflow_path(old)):
                    self._release(path)
                    path.unlink(missing_ok=True)
                logger.info("removed %s", old)
                self.written = [path for path in self.written if path != old]
        if point.retires_state and self._config.save_state:
            old = self._folder / f"{point.retires_state}{STATE_SUFFIX}"
            if old.exists():
                self._release(old)
                shutil.rmtree(old)
                logger.info("removed %s", old)
                self.written = [path for path in self.written if path != old]

    def _release(self, path: Path) -> None:
        if self.uploader is not None:
            self.uploader.wait_for(path)


class SavingListener:
    """Saves every n steps, every n epochs and at the end."""

    def __init__(self, saver: Saver, config: SavingConfig, *, num_epochs: int) -> None:
        self._saver, self._config, self._num_epochs = saver, config, num_epochs

    def on_start(self, state: TrainState) -> TrainState:
        return state

    def wants_weights(self, step: int) -> bool:
        """Where it saves."""
        return step_save(self._config, step=step) is not None

    def on_step(self, state: TrainState, report: StepReport) -> TrainState:
        del report
        point = step_save(self._config, step=state.step)
        if point:
            self._saver.at(point, state, epoch=state.epoch)
        return state

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState:
        point = epoch_save(self._config, epoch=epoch, num_epochs=self._num_epochs)
        if point:
            self._saver.at(point, state, epoch=epoch)
        return state

    def on_end(self, state: TrainState) -> TrainState:
        self._saver.final(state, epoch=self._num_epochs)
        return state
