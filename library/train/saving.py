"""When the network and the state are written, and which old files go."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch

from library.config.sections.saving import SavingConfig
from library.distributed.base import Backend
from library.errors import WriteFailed
from library.files.refusals import refusals_named
from library.train.checkpoint import STATE_SUFFIX, SavedRun, save_run
from library.train.ema import Ema
from library.train.naming import (
    SavePoint,
    average_stem,
    best_stem,
    epoch_save,
    last_stem,
    model_path,
    step_save,
    step_stem,
)
from library.train.run_log import Saved
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
class Weights:
    """The network, and ways to have weights in it: those trained, as they are to be used, and their average."""

    network: NetworkHandle
    trained: Callable[[], AbstractContextManager[None]]
    ema: Ema | None
    judged_by_ema: bool  # samples and validation see the average

    def judged(self) -> AbstractContextManager[None]:
        """Those that samples are drawn with and validation measures."""
        return self.ema.in_use() if self.ema is not None and self.judged_by_ema else self.trained()


class Saver:
    """Writes model files and state folders. Every rank calls it and gives what it holds; rank 0 writes."""

    def __init__(
        self,
        *,
        config: SavingConfig,
        weights: Weights,
        metadata: Callable[[TrainState, int], Mapping[str, str]],
        capture: Callable[[TrainState], SavedRun],
        backend: Backend,
        record: Callable[[Saved], None] = lambda saved: None,
        uploader: Uploader | None = None,
    ) -> None:
        self.weights, self._record, self._uploader = weights, record, uploader
        assert config.output_dir is not None, "checked by the config rules"
        self._config, self._folder, self._network = config, config.output_dir, weights.network
        self._metadata, self._capture = metadata, capture
        self._backend, self._world = backend, backend.world
        self.written: list[Path] = []
        self._best_stem = best_stem(config.output_name)
        self._checked = False  # whether it was said that a file was read back and is whole

    def model(self, stem: str, state: TrainState, *, epoch: int, final: bool = False) -> Path:
        """Write the network as `<stem>.<save_model_as>`; `epoch` is what ss_epoch says."""
        with self.weights.trained():
            path = self._write(stem, state, epoch=epoch, what="model")
        self._upload(path, now=final)
        return path

    def average(self, stem: str, state: TrainState, *, epoch: int, final: bool = False) -> Path | None:
        """Write the averaged weights beside those of `stem`, if there is an average."""
        if self.weights.ema is None:
            return None
        with self.weights.ema.in_use():
            path = self._write(average_stem(stem), state, epoch=epoch, what="ema")
        self._upload(path, now=final)
        return path

    def best(self, state: TrainState) -> None:
        """Write the weights that validation found best so far; the last of them is uploaded when the run ends."""
        with self.weights.judged():
            self._tried(lambda: self._write(self._best_stem, state, epoch=state.epochs_begun, what="best"))

    def _write(self, stem: str, state: TrainState, *, epoch: int, what: str) -> Path:
        """Write the weights that are in the network now."""
        path = model_path(self._config, stem)
        with self._backend.whole(self._network.module):
            start = time.perf_counter()
            if self._world.is_main:
                dtype = SAVE_DTYPES[self._config.save_precision]
                with refusals_named(path):
                    self._network.save(path, dtype=dtype, metadata=self._metadata(state, epoch))
        if self._world.is_main:
            seconds = time.perf_counter() - start
            logger.info("saved %s (%.1f MB, %.1f s)", path, path.stat().st_size / 1e6, seconds)
            self._check(path)
            self._note(path, state, what)
        return path

    def _note(self, path: Path, state: TrainState, what: str) -> None:
        self.written = [*(old for old in self.written if old != path), path]
        self._record(Saved(step=state.step, what=what, file=path.name))

    def _upload(self, path: Path, *, now: bool = False) -> None:
        if self._world.is_main and self._uploader is not None:
            self._uploader.put(path, now=now)

    def _check(self, path: Path) -> None:
        """Read the file as a stranger would; what is wrong is said each time, that all is well once."""
        report = read_back(path)
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
            self._note(folder, state, "state")
            if self._config.save_state_to_huggingface:
                self._upload(folder)
        return folder

    def interrupted(self, state: TrainState) -> Path:
        """Write the state of a run that was asked to stop."""
        return self.state(step_stem(self._config.output_name, state.step), state)

    def at(self, point: SavePoint, state: TrainState, *, epoch: int) -> None:
        """Write what is due at `point`, then remove what it retires.

        A disk that refuses ends no training: the next point tries again, and what is there stays.
        """
        written = self._tried(lambda: self.model(point.stem, state, epoch=epoch))
        # Tried as well where the first failed: other ranks take part in it.
        written = self._tried(lambda: self.average(point.stem, state, epoch=epoch)) and written
        if self._config.save_state:
            written = self._tried(lambda: self.state(point.stem, state)) and written
        if self._world.is_main and written:
            self._retire(point)

    def _tried(self, write: Callable[[], object]) -> bool:
        try:
            write()
        except WriteFailed as error:
            logger.error("%s Training goes on; nothing older is removed", error)
            return False
        return True

    def final(self, state: TrainState, *, epoch: int) -> Path:
        """Write the finished network, its average if there is one, and the last state if asked."""
        path = self.model(last_stem(self._config.output_name), state, epoch=epoch, final=True)
        self.average(last_stem(self._config.output_name), state, epoch=epoch, final=True)
        self.written.sort(key=lambda written: written == path)  # last of all, for it is the result
        best = model_path(self._config, self._best_stem)
        if best in self.written:
            self._upload(best, now=True)
        if self._config.save_state or self._config.save_state_on_train_end:
            self.state(last_stem(self._config.output_name), state)
        return path

    def finish(self) -> None:
        """Wait, not for ever, until everything is uploaded."""
        if self._uploader is not None:
            self._uploader.finish()

    def failed(self) -> None:
        """An error ends the run: say what is left of it, and upload that."""
        for what, kept in (("network file", Path.is_file), ("state", Path.is_dir)):
            paths = [path for path in self.written if kept(path)]
            if paths:
                logger.info("the last whole %s is %s", what, paths[-1])
        self.finish()

    def _retire(self, point: SavePoint) -> None:
        retired = (point.retires_model, average_stem(point.retires_model)) if point.retires_model else ()
        for old in (model_path(self._config, stem) for stem in retired):
            if old.exists():
                self._release(old)
                old.unlink()
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
        if self._uploader is not None:
            self._uploader.wait_for(path)


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
        # A run that stops early ends in an epoch of its own.
        self._saver.final(state, epoch=min(state.epochs_begun, self._num_epochs))
        return state
