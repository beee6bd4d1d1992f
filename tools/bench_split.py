"""Where the time of training steps goes: marks on the device's own clock, set by what the trainer calls.

Nothing of the trainer is changed: its batches, its root module, its backend and its stepper are watched. Marks lie in
the order in which the device works, so a phase has what the device did, and the waiting it did, since the last mark.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from library.data.records import Batch
from library.distributed.base import Backend
from library.train.trainer import StepReport, Trainer

Mark = tuple[str, Any]  # the phase that ends here, and when


class Split:
    """Marks of the steps that are made while it watches."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Mark] = []
        self.data = 0.0  # seconds that the host waited for batches
        self.steps = 0  # as many were begun and ended: one more than were reported, where steps run ahead

    def mark(self, phase: str) -> None:
        """What the device did since the last mark is `phase`."""
        if self._device.type != "cuda":
            self._marks.append((phase, time.perf_counter()))
        elif not torch.cuda.is_current_stream_capturing():
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            event.record()
            self._marks.append((phase, event))

    def batches(self, stream: Iterator[Batch]) -> Iterator[Batch]:
        """The same batches, the wait for each counted."""
        while True:
            began = time.perf_counter()
            batch = next(stream, None)
            self.data += time.perf_counter() - began
            if batch is None:
                return
            self.mark("between")
            yield batch

    def watch(self, module: nn.Module, backend: Backend) -> Callable[[], None]:
        """Mark what is called of these from now on. Returns what ends it."""
        stepper = backend.stepper
        plain = {(owner, name): getattr(owner, name) for owner, name in (
            (backend, "backward"), (stepper, "clip"), (stepper, "step"),
        )}  # fmt: skip

        def watched(owner: object, name: str, before: str, after: str) -> None:
            called = plain[owner, name]

            def call(*arguments: Any, **options: Any) -> Any:
                self.mark(before)
                result = called(*arguments, **options)
                self.mark(after)
                self.steps += name == "step"
                return result

            setattr(owner, name, call)

        watched(backend, "backward", "forward", "backward")
        # A recorded step runs neither forward nor backward here: all of it lies before the clip.
        watched(stepper, "clip", "rest", "optimizer")
        watched(stepper, "step", "rest", "optimizer")
        hook = module.register_forward_pre_hook(lambda *_: self.mark("inputs"))

        def end() -> None:
            hook.remove()
            for owner, name in plain:
                delattr(owner, name)

        return end

    def seconds(self) -> dict[str, float]:
        """Mean seconds a step by phase, after all of them are done; `data` is the host's and lies within `between`."""
        totals: dict[str, float] = {"data": self.data}
        for (_, begun), (phase, ended) in zip(self._marks, self._marks[1:], strict=False):
            taken = ended - begun if isinstance(ended, float) else begun.elapsed_time(ended) / 1000
            totals[phase] = totals.get(phase, 0.0) + taken
        return {phase: round(total / self.steps, 5) for phase, total in totals.items()}


def splits(trainer: Trainer, stream: Iterator[Batch], steps: int) -> dict[str, dict[str, float]]:
    """The split of steps as they are made, and, where they are recorded, of steps launched kernel by kernel: in a
    recorded one all up to the clipping is `rest`.
    """
    found = {"split": split(trainer, stream, steps)}
    if trainer.graphs is not None:
        recorded, trainer.graphs = trainer.graphs, None
        found["split_unrecorded"] = split(trainer, stream, steps)
        trainer.graphs = recorded
    return found


def split(trainer: Trainer, stream: Iterator[Batch], steps: int) -> dict[str, float]:
    """Train `steps` more and tell where their time went; with several ranks, how long NCCL's kernels ran as well."""
    device = trainer.backend.world.device
    watcher = Split(device)
    end = watcher.watch(trainer.module, trainer.backend)
    try:
        reports = trainer.steps(watcher.batches(stream))
        _take(reports, steps)
    finally:
        end()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    found = watcher.seconds()
    if trainer.backend.world.size > 1 and device.type == "cuda":
        found["communication"] = round(communication(trainer, stream), 5)
    return found


def communication(trainer: Trainer, stream: Iterator[Batch]) -> float:
    """Seconds a step that NCCL's kernels ran, whether or not anything waited for them; from two profiled steps."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as recorded:
        _take(trainer.steps(stream), 2)
    kernels = (event for event in recorded.key_averages() if "nccl" in event.key.lower())
    return sum(event.self_device_time_total for event in kernels) / 1e6 / 2


def _take(reports: Iterator[StepReport], steps: int) -> None:
    for _ in range(steps):
        next(reports)
