"""When the network and the state are written, and which old files go."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.config.sections.saving import SavingConfig
from library.distributed.base import Backend
from library.errors import TrainingDiverged, WriteFailed
from library.files.atomic import write_text
from library.files.refusals import refusals_named
from library.files.safetensors import SAVE_DTYPES
from library.train.checkpoint import (
    SavedRun,
    clear_leftovers,
    save_run,
    what_is_wrong,
)
from library.train.elsewhere import Elsewhere
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
    workflow_path,
)
from library.train.retention import must_go_first, remove, retired, state_path
from library.train.run_log import Saved
from library.train.state import TrainState
from library.train.trainer import StepReport
from library.train.upload import Uploader
from networks.interface import NetworkHandle
from networks.readback import read_back

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Weights:
    """The network, and ways to have weights in it: those trained, as they are to be used, and their average."""

    network: NetworkHandle
    trained: Callable[[], AbstractContextManager[None]]
    ema: Ema | None
    judged_by_ema: bool  # samples and validation see the average
    keeps_best: bool = False  # those that validation finds best are in a file of their own

    def judged(self) -> AbstractContextManager[None]:
        """Those that samples are drawn with and validation measures."""
        return self.ema.in_use() if self.ema is not None and self.judged_by_ema else self.trained()


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
        weights: Weights,
        about: About,
        capture: Callable[[TrainState], SavedRun],
        backend: Backend,
        record: Callable[[Saved], None] = lambda saved: None,
        uploader: Uploader | None = None,
    ) -> None:
        self.weights, self._about, self._record, self.uploader = weights, about, record, uploader
        assert config.output_dir is not None, "checked by the config rules"
        self._config, self._folder, self._network = config, config.output_dir, weights.network
        self._capture = capture
        self._backend, self._world = backend, backend.world
        self.written: list[Path] = []
        self.saves = 0  # network files written
        self.newest: Path | None = None  # the network file written last
        self.readers = ""  # the programs that load it
        self._best_stem = best_stem(config.output_name)
        self._elsewhere = Elsewhere(self._folder, last_stem(config.output_name))
        if self._world.is_main:
            clear_leftovers(self._folder, config.output_name)
        self._checked = False  # whether it was said that a file was read back and is whole

    def model(self, stem: str, state: TrainState, *, epoch: int, final: bool = False) -> Path:
        """Write the network as `<stem>.<save_model_as>`; `epoch` is what ss_epoch says."""
        with self.weights.trained():
            path = self._write(stem, state, epoch=epoch, what="model", final=final)
        self._upload(path, now=final)
        return path

    def average(self, stem: str, state: TrainState, *, epoch: int, final: bool = False) -> Path | None:
        """Write the averaged weights beside those of `stem`, if there is an average."""
        if self.weights.ema is None:
            return None
        with self.weights.ema.in_use():
            path = self._write(average_stem(stem), state, epoch=epoch, what="ema", final=final)
        self._upload(path, now=final)
        return path

    def best(self, state: TrainState) -> None:
        """Write the weights that validation found best so far; the last of them is uploaded when the run ends."""
        with self.weights.judged():
            self._tried(lambda: self._write(self._best_stem, state, epoch=state.epochs_begun, what="best"))

    def _write(self, stem: str, state: TrainState, *, epoch: int, what: str, final: bool = False) -> Path:
        """Write the weights that are in the network now."""
        path = model_path(self._config, stem)
        with self._backend.whole(self._network.module):
            start = time.perf_counter()
            if self._world.is_main:
                dtype, metadata = SAVE_DTYPES[self._config.save_precision], self._about.metadata(state, epoch)
                # Other ranks wait in `whole`, so another place is tried in here.
                path = self._put(
                    path, lambda file: self._network.save(file, dtype=dtype, metadata=metadata), final=final
                )
        if self._world.is_main:
            seconds = time.perf_counter() - start
            logger.info("saved %s (%.1f MB, %.1f s)", path, path.stat().st_size / 1e6, seconds)
            self._check(path)
            self._note(path, state, what)
            self._write_workflow(path)
            if what == "model":
                self.saves, self.newest = self.saves + 1, path
        return path

    def _put(self, path: Path, write: Callable[[Path], None], *, final: bool) -> Path:
        """Let `write` make `path`; with `final`, no later save makes good for it, so it may go elsewhere.

        Returns where it is.
        """
        try:
            with refusals_named(path):
                write(path)
        except WriteFailed as error:
            if not final:
                raise
            return self._elsewhere.put(path.name, write, error)
        return path

    @property
    def misplaced(self) -> str:
        """What is elsewhere because the output folder refused it, and what to do, in one sentence; else empty."""
        return self._elsewhere.notice

    def _note(self, path: Path, state: TrainState, what: str) -> None:
        self.written = [*(old for old in self.written if old != path), path]
        self._record(Saved(step=state.step, what=what, file=path.name))

    def _upload(self, path: Path, *, now: bool = False) -> None:
        if not self._world.is_main or self.uploader is None:
            return
        self.uploader.put(path, now=now)
        workflow = workflow_path(path)
        if workflow.is_file():
            self.uploader.put(workflow)

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

    def state(self, stem: str, state: TrainState, *, final: bool = False) -> Path:
        """Write the state folder `<stem>-state`, with the weights that steps are taken from."""
        folder = state_path(self._config, stem)
        run = self._capture(state)
        if self._world.is_main:
            folder = self._put(folder, lambda target: save_run(target, run), final=final)
            logger.info("saved the state in %s", folder)
            self._note(folder, state, "state")
            if self._config.save_state_to_huggingface:
                self._upload(folder)
        return folder

    def interrupted(self, state: TrainState) -> Path:
        """Write the state of a run that was asked to stop. Returns where it is."""
        self._check_finite(state)
        return self.state(step_stem(self._config.output_name, state.step), state, final=True)

    def diverged(self, state: TrainState) -> Path | None:
        """Write the state before the step that was not finite; None where it is lost as well, or the disk refuses.

        A last update can leave weights that are not finite and show in the next loss only: no state to go on from.
        """
        try:
            return self.interrupted(state)
        except TrainingDiverged:
            logger.error("no state is left of step %d, as its weights are not finite", state.step)
        except WriteFailed as error:
            logger.error("%s", error)
        return None

    def rescue(self, state: TrainState) -> None:
        """An error of this rank, and maybe of no other, ends the run: write what is done, without the others.

        Where that takes all ranks (ZeRO), or the disk refuses as well, the last state will have to do.
        """
        folder = state_path(self._config, step_stem(self._config.output_name, state.step))
        if folder in self.written or not self._backend.captures_alone:
            return
        run = self._capture(state)
        if not _are_finite(run.network.values()):  # asked of the copy, as the GPU may have no memory left
            return

        def write(target: Path) -> None:
            try:
                with refusals_named(target):
                    save_run(target, run)
            except WriteFailed:
                if what_is_wrong(target) is not None:  # or another rank, in the same trouble, was faster
                    raise

        try:
            kept = self._put(folder, write, final=True)
        except WriteFailed as error:
            logger.error("%s", error)
            return
        self.written.append(kept)
        logger.error(
            "what is done, %d steps, is kept in %s; --resume %s goes on from there",
            state.step, kept, "auto" if kept == folder else kept,
        )  # fmt: skip

    def at(self, point: SavePoint, state: TrainState, *, epoch: int) -> None:
        """Write what is due at `point`, then remove what it retires.

        A disk that refuses ends no training: the next point tries again, and what is there stays. Weights that are
        not finite do, before they take the place of others: TrainingDiverged.
        """
        self._check_finite(state)
        old = retired(self._config, point) if self._world.is_main else ()
        if must_go_first(old, self.written):
            logger.warning("%s is nearly full, so what is too old goes before a save", self._folder)
            self._retire(old)
            old = ()
        written = self._tried(lambda: self.model(point.stem, state, epoch=epoch))
        # Tried as well where the first failed: other ranks take part in it.
        written = self._tried(lambda: self.average(point.stem, state, epoch=epoch)) and written
        if self._config.save_state:
            written = self._tried(lambda: self.state(point.stem, state)) and written
        if written:
            self._retire(old)

    def _check_finite(self, state: TrainState) -> None:
        """Asked of all ranks together, which hold the same. Raises TrainingDiverged."""
        module = self._network.module
        with self._backend.whole(module), torch.no_grad():
            finite = _are_finite(module.parameters())
        if not finite:
            raise TrainingDiverged(
                f"step {state.step}: it left weights that are not finite, so they are not saved and training stopped; "
                'lower the learning rate, or use mixed_precision = "bf16" or "no"'
            )

    def _tried(self, write: Callable[[], object]) -> bool:
        error = _refusal(write)
        if error is not None:
            logger.error("%s Training goes on; what is there stays", error)
        return error is None

    def final(self, state: TrainState, *, epoch: int) -> None:
        """Write the finished network, its average if there is one, and the last state if asked.

        Raises WriteFailed where the output folder took not all of it, after all was tried and is elsewhere if that
        can be, and TrainingDiverged where weights are not finite.
        """
        self._check_finite(state)
        stem = last_stem(self._config.output_name)
        refusals = [
            _refusal(lambda: self.model(stem, state, epoch=epoch, final=True)),
            _refusal(lambda: self.average(stem, state, epoch=epoch, final=True)),
        ]
        result = model_path(self._config, stem).name
        self.written.sort(key=lambda written: written.name == result)  # last of all
        best = model_path(self._config, self._best_stem)
        if self.weights.keeps_best and best.is_file():  # of this process, or of the run before it was resumed
            self._upload(best, now=True)
        if self._config.save_state or self._config.save_state_on_train_end:
            refusals.append(_refusal(lambda: self.state(stem, state, final=True)))
        lost = [str(refusal) for refusal in refusals if refusal is not None]
        if lost or self.misplaced:
            raise WriteFailed(" ".join((*lost, self.misplaced)).strip())

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

    def _retire(self, old: Sequence[Path]) -> None:
        for path in old:
            with suppress(OSError):
                remove(path, self._release)
            if path.exists():  # as where another program has it open
                logger.warning("%s could not be removed", path)
            else:
                logger.info("removed %s", path)
        self.written = [path for path in self.written if path not in old or path.exists()]

    def _release(self, path: Path) -> None:
        if self.uploader is not None:
            self.uploader.wait_for(path)


def _refusal(write: Callable[[], object]) -> WriteFailed | None:
    """Write, and give what the disk says against it."""
    try:
        write()
    except WriteFailed as error:
        return error
    return None


def _are_finite(tensors: Iterable[Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)


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
