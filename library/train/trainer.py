"""The training loop. One optimizer step reads from top to bottom; everything else happens in listeners.

A step is a list of micro-steps. Each sample carries its share of the step's loss (1 / samples of the step, over all
ranks and micro-steps), so the gradient is the mean over the step's samples however they are dealt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from library import randomness
from library.adapters.base import ModelAdapter, StepInputs
from library.data.records import Batch
from library.distributed.base import Backend
from library.distributed.precision import is_lost
from library.errors import TrainingDiverged
from library.flow.objective import Draw, Objective
from library.optim.factory import BuiltOptimizer
from library.optim.schedules import Schedule
from library.train.ema import Ema
from library.train.graphs import StepGraphs
from library.train.preservation import preserve_output
from library.train.reading import Laps, Reading
from library.train.sample_losses import SampleLoss, SampleLosses
from library.train.state import TrainState
from networks.interface import NetworkHandle, NormReport

# Laps of a step; what ranks exchange of gradients lies in the passes.
DATA, PASSES = "data", "forward_backward"


@dataclass(frozen=True, slots=True)
class StepReport:
    """What one optimizer step did, the same on every rank but for times."""

    loss: float  # mean over the step's samples
    grad_norm: float  # L2, before clipping
    learning_rates: Mapping[str, float]  # by parameter group, as used in this step
    samples: int
    seconds: float
    skipped: bool  # fp16 overflow: the parameters were left as they were
    max_norm: NormReport | None = None  # what scale_weight_norms did
    norms: Mapping[str, float] = field(default_factory=dict)  # what the network reports after it, by tag
    sample_losses: Sequence[SampleLoss] = ()  # of all ranks
    laps: Mapping[str, float] = field(default_factory=dict)  # seconds of this rank's device by lap


class Listener(Protocol):
    """Something that happens beside training: logging, validation, previews, saving.

    One that has a method `wants_weights(step)` is asked which steps it must be told of before the next one
    begins, because it reads or changes what is trained; one that has none is told at once of every step. The
    answer is the same on every rank: one that launches a step which another does not waits for it for ever. So
    a listener of one rank alone wants no weights. At the end of an epoch all are told at once.
    """

    def on_start(self, state: TrainState) -> TrainState: ...

    def on_step(self, state: TrainState, report: StepReport) -> TrainState: ...

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState: ...

    def on_end(self, state: TrainState) -> TrainState: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How long to train, and what a step may do."""

    total_steps: int
    micro_steps: int  # micro-batches of one optimizer step on this rank
    max_grad_norm: float
    scale_weight_norms: float | None


@dataclass(frozen=True, slots=True)
class _Launched:
    """A step that the device has been given, and whose numbers nobody has read."""

    begun: float
    reading: Reading  # loss, samples, wish to stop, gradient norm, then the losses of samples
    rates: Mapping[str, float]
    skipped: bool
    max_norm: NormReport | None
    norms: tuple[tuple[str, ...], Reading] | None  # by tag; None where the network reports none
    laps: Laps  # up to the reading


@dataclass(slots=True, kw_only=True)
class Trainer:
    """Runs optimizer steps from the state's step to the last one."""

    module: nn.Module  # the root module, as the backend wrapped it
    adapter: ModelAdapter
    network: NetworkHandle
    parameters: Sequence[nn.Parameter]
    objective: Objective
    optimizer: BuiltOptimizer
    schedule: Schedule
    backend: Backend
    limits: Limits
    listeners: Sequence[Listener]
    state: TrainState
    should_stop: Callable[[], bool]  # whether this process was asked to stop
    graphs: StepGraphs | None = None  # records micro-steps
    scheduled: int = field(default=0, init=False)  # steps that the schedule is ahead of the state
    has_enough: Callable[[TrainState], bool] = lambda state: False  # ends a run early; alike on every rank
    ema: Ema | None = None
    sample_losses: SampleLosses | None = None
    _settled: float = field(default=0.0, init=False)  # when the last report was read
    _diverged: Tensor | None = field(default=None, init=False)  # [], 1 once a step was not finite
    _flying: _Launched | None = field(default=None, init=False)  # the step that the state does not count yet
    _updating: bool = field(default=False, init=False)  # an update has begun and not ended

    def run(self, batches: Iterator[Batch]) -> bool:
        """Train to the last step. False when a signal ended it early; the caller then saves the state."""
        self._tell(lambda listener, state: listener.on_start(state))
        self.network.on_epoch_start()
        for report in self.steps(batches):
            self._after_step(report)
        if self.state.step < self.limits.total_steps and not self.has_enough(self.state):
            return False
        self._tell(lambda listener, state: listener.on_end(state))
        return True

    def steps(self, batches: Iterator[Batch]) -> Iterator[StepReport]:
        """The reports of all steps up to the last one, or to the first after a rank was asked to stop.

        Where nothing needs the numbers of a step at once, the next step is given to the device before they
        are read: the device is never idle. Then weights may be one step ahead of the report.
        """
        stop = False
        while not stop and self.state.step + (self._flying is not None) < self.limits.total_steps:
            # What it asks is known when nothing flies.
            if self._flying is None and self.has_enough(self.state):
                return
            launched = self.launch(batches)
            before, self._flying = self._flying, launched
            if before is not None:
                report, stop = self.settle(before)
                yield report
            if not self.runs_ahead or self._weights_wanted(self.state.step + 1):
                report, stops = self.settle(launched)
                self._flying, stop = None, stop or stops
                yield report
        if self._flying is not None:
            launched, self._flying = self._flying, None
            yield self.settle(launched)[0]

    def landed(self) -> TrainState | None:
        """The state that the weights are of, after an error; None where it cut an update off or nothing is finite."""
        if self._updating:
            return None
        if self._flying is not None:
            launched, self._flying = self._flying, None
            try:
                self.settle(launched)
            except TrainingDiverged:
                return None
        return self.state

    def optimizer_step(self, batches: Iterator[Batch]) -> tuple[StepReport, bool]:
        """One step and its report at once, and whether any rank was asked to stop."""
        return self.settle(self.launch(batches))

    @property
    def runs_ahead(self) -> bool:
        """Whether a step can be given to the device whole: nothing on the host depends on its numbers.

        An optimizer that cannot be told by the device to leave out a step has to wait for the loss, and so do
        fp16's loss scaling, ZeRO, schedules that follow the loss, and scale_weight_norms.
        """
        device_decides = self.optimizer.can_leave_out and self.backend.stepper.leaves_to_device
        return device_decides and not (self.schedule.needs_loss or self.limits.scale_weight_norms)

    def launch(self, batches: Iterator[Batch]) -> _Launched:
        """Give one step to the device: micro-steps, clip, update."""
        begun, laps = time.perf_counter(), Laps(self.backend.world.device)
        total = torch.zeros(3, device=self.backend.world.device)  # loss, samples, wish to stop
        for micro_step in range(self.limits.micro_steps):
            batch = next(batches)
            laps.mark(DATA)
            with self.backend.accumulate(last=micro_step == self.limits.micro_steps - 1):
                total[0] += self.micro_step(batch)
            laps.mark(PASSES)
            total[1] += int((batch.shares > 0).sum())
        total[2] = float(self.should_stop())
        grad_norm = self.backend.stepper.clip(
            self.optimizer.optimizer, self.parameters, self.limits.max_grad_norm
        )
        self.network.on_gradients()
        norm = torch.as_tensor(grad_norm, dtype=total.dtype, device=total.device).detach().reshape(1)
        table = self.sample_losses.take() if self.sample_losses is not None else total[:0]
        total, table = self.backend.sum(torch.cat((total, table))).tensor_split((3,))
        numbers = torch.cat((total, norm, table))
        reading = Reading(numbers)
        loss: float | None = None
        if self.runs_ahead:
            # After a step that is not finite no other is made either: its report ends the run.
            bad = 1 - torch.isfinite(numbers).all().float()
            self._diverged = bad if self._diverged is None else torch.maximum(self._diverged, bad)
            self.optimizer.leave_out(self._diverged)
        else:
            loss, _, _, length, *_ = reading.wait()  # the step's one wait for the device
            self._check_finite(loss, length)
        adapted = {f"d*lr/{name}": rate for name, rate in self.optimizer.adapted_rates().items()}
        rates = {**self.optimizer.learning_rates(), **adapted}
        self._updating = True
        stepped = self.backend.stepper.step(self.optimizer.optimizer)
        if stepped:
            self.schedule.step(loss)
            self.scheduled += 1
        max_norm = self._limit_norms()
        if stepped and self.ema is not None:
            self.ema.update()
        norms = self._read_norms()
        self._updating = False  # only now: the state counts no step that was not returned
        return _Launched(begun, reading, rates, not stepped, max_norm, norms, laps)

    def settle(self, launched: _Launched) -> tuple[StepReport, bool]:
        """Read a launched step's numbers: its report, and whether any rank was asked to stop."""
        loss, samples, stop, norm, *table = launched.reading.wait()
        self._check_finite(loss, norm)
        self.state = self.state.after_step(loss=loss, samples=int(samples))
        self.scheduled -= not launched.skipped
        now = time.perf_counter()
        seconds, self._settled = now - max(launched.begun, self._settled), now
        norms: dict[str, float] = {}
        if launched.norms is not None:
            tags, values = launched.norms
            norms = dict(zip(tags, values.wait(), strict=True))
        report = StepReport(
            loss, norm, launched.rates, int(samples), seconds, launched.skipped, launched.max_norm, norms,
            self.sample_losses.read(table) if self.sample_losses is not None else (),
            launched.laps.seconds(),
        )  # fmt: skip
        return report, stop > 0

    def micro_step(self, batch: Batch) -> Tensor:
        """Forward and backward of one micro-batch. Returns its part of the step's loss, detached, []."""
        inputs = self.adapter.inputs(batch)
        draw = self.objective.draw(inputs.latents, batch.visits, seed=self.state.seed)
        if batch.preserve is not None:
            draw = preserve_output(
                draw, inputs, batch.preserve, module=self.module, network=self.network,
                objective=self.objective, ranks=self.backend.world.size,
            )  # fmt: skip
        images = None if self.sample_losses is None else self.sample_losses.images(batch)
        # Dropouts inside a network use torch's global generators: seeded by what is trained, not by when.
        torch.manual_seed(randomness.integer(self.state.seed, "network", *batch.visits[0]))
        self.network.on_step_start()
        run = self.differentiate if self.graphs is None else partial(self.graphs.run, self.differentiate)
        loss_B = run(draw, inputs)
        if self.sample_losses is not None and images is not None:
            self.sample_losses.note(images, draw.t, loss_B)
        return (loss_B * inputs.sample_weights).sum()

    def differentiate(self, draw: Draw, inputs: StepInputs) -> Tensor:
        """The one use of all that is trained, forward and backward. Returns the samples' losses, detached, [B].

        Everything in it happens on the device and depends on nothing but its arguments, so it may be recorded.
        """
        prediction = self.module(draw.x_t, draw.t, inputs.cond)  # [B, 16, h, w]
        loss_B = self.objective.loss(prediction, draw, inputs.mask)  # [B]
        self.backend.backward((loss_B * inputs.sample_weights).sum())
        return loss_B.detach()

    def _after_step(self, report: StepReport) -> None:
        self._tell(lambda listener, state: listener.on_step(state, report))
        step, steps_per_epoch = self.state.step, self.state.steps_per_epoch
        if step % steps_per_epoch == 0 or step == self.limits.total_steps:
            self._tell(lambda listener, state: listener.on_epoch(state, math.ceil(step / steps_per_epoch)))
            self.network.on_epoch_start()

    def _limit_norms(self) -> NormReport | None:
        """Apply scale_weight_norms; None without it."""
        most = self.limits.scale_weight_norms
        if not most:
            return None
        with self.backend.whole(self.network.module, changing=True):
            return self.network.apply_max_norm(most)

    def _read_norms(self) -> tuple[tuple[str, ...], Reading] | None:
        """The norms that the network reports of itself as it is when the device gets here."""
        norms = self.network.norms()
        if not norms:
            return None
        device = self.backend.world.device
        values = torch.stack([norm.detach().to(device, torch.float32) for norm in norms.values()])
        return tuple(norms), Reading(values)

    def _weights_wanted(self, step: int) -> bool:
        """Whether anything must happen between optimizer step `step` and the next one."""
        if step % self.state.steps_per_epoch == 0 or step == self.limits.total_steps:
            return True
        asked = (getattr(listener, "wants_weights", None) for listener in self.listeners)
        return any(ask is None or ask(step) for ask in asked)

    def _check_finite(self, loss: float, grad_norm: float) -> None:
        if is_lost(loss, grad_norm, self.backend.stepper.state()):
            raise TrainingDiverged(
                f"step {self.state.step + 1}: the loss is {loss} and the gradient norm {grad_norm}, so training "
                'stopped before this update; lower the learning rate, or use mixed_precision = "bf16" or "no"'
            )

    def _tell(self, event: Callable[[Listener, TrainState], TrainState]) -> None:
        for listener in self.listeners:
            self.state = event(listener, self.state)
