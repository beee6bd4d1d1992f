"""Loss on pictures kept out of training, on a draw that never changes, so that two values can be compared.

Every validation sample is seen at the same four timesteps with the same noise each time: the t that Kohya's
options name (the four inner points of six over the range), which Kohya itself ignores for FLUX.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import nn

from library.adapters.base import ModelAdapter
from library.config.sections.validation import ValidationConfig
from library.data.records import Batch
from library.distributed.base import Backend
from library.flow.objective import Objective
from library.train.best import has_stalled, is_best, lowest
from library.train.preservation import preserve_output
from library.train.state import TrainState, falling_ratio
from library.train.trainer import StepReport
from networks.interface import NetworkHandle

logger = logging.getLogger(__name__)


def fixed_timesteps(least: int | None, most: int | None) -> tuple[float, ...]:
    """The four validation timesteps: inner points of six over [least, most] within 0..1000, truncated."""
    low, high = least or 0, 1000 if most is None else most
    return tuple(float(int(low + (high - low) * i / 5)) for i in range(1, 5))


@dataclass(frozen=True, slots=True)
class Validation:
    """What one validation measured."""

    loss: float  # mean over samples and timesteps
    by_timestep: Mapping[float, float]  # timestep of 0..1000 -> mean over samples


@dataclass(frozen=True, slots=True, kw_only=True)
class Validator:
    """Mean loss over this rank's share of the validation batches, summed over ranks."""

    module: nn.Module
    network: NetworkHandle
    adapter: ModelAdapter
    objective: Objective
    backend: Backend
    batches: Callable[[], Iterable[Batch]]
    timesteps: tuple[float, ...]  # 0..1000
    seed: int

    @torch.no_grad()
    def measure(self) -> Validation:
        """The means over validation samples, and timesteps; the same on every rank."""
        self.module.eval()
        # Sums by timestep, then the number of samples.
        total = torch.zeros(len(self.timesteps) + 1, device=self.backend.world.device)
        for batch in self.batches():
            inputs = self.adapter.inputs(batch)
            real = (batch.shares > 0).to(total.device)
            for number, t in enumerate(self.timesteps):
                times = [t] * len(batch.visits)
                draw = self.objective.draw_fixed(
                    inputs.latents, batch.visits, seed=self.seed, timesteps=times
                )
                if batch.preserve is not None:
                    draw = preserve_output(
                        draw, inputs, batch.preserve, module=self.module, network=self.network,
                        objective=self.objective, ranks=self.backend.world.size,
                    )  # fmt: skip
                prediction = self.module(draw.x_t, draw.t, inputs.cond)
                losses = self.objective.loss(prediction, draw, inputs.mask)  # [B]
                total[number] += (losses * real).sum()
            total[-1] += real.sum()
        self.module.train()
        *sums, count = self.backend.sum(total).tolist()
        loss = sum(sums) / (count * len(sums))
        return Validation(loss, {t: each / count for t, each in zip(self.timesteps, sums, strict=True)})


class ValidationListener:
    """Validates at the start, every n steps and at epoch ends; says how far the loss fell.

    `evaluating` has the weights in place that are validated. `on_measured` are told what was, and `keep` of the best
    so far, on every rank.
    """

    def __init__(
        self,
        validator: Validator,
        config: ValidationConfig,
        *,
        evaluating: Callable[[], AbstractContextManager[None]],
        on_measured: Sequence[Callable[[TrainState, Validation], None]] = (),
        keep: Callable[[TrainState], None] | None = None,
    ) -> None:
        self._validator, self._evaluating = validator, evaluating
        self._config, self._on_measured, self._keep = config, tuple(on_measured), keep
        self._every_steps = config.validate_every_n_steps
        self._every_epochs = config.validate_every_n_epochs or 1

    def on_start(self, state: TrainState) -> TrainState:
        return state if state.validation_losses else self._validate(state)

    def wants_weights(self, step: int) -> bool:
        """Where it validates."""
        return bool(self._every_steps and step % self._every_steps == 0)

    def on_step(self, state: TrainState, report: StepReport) -> TrainState:
        del report
        return self._validate(state) if self.wants_weights(state.step) else state

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState:
        due = epoch % self._every_epochs == 0 and state.validation_losses[-1][0] != state.step
        return self._validate(state) if due else state

    def on_end(self, state: TrainState) -> TrainState:
        losses = [loss for _, loss in state.validation_losses]
        ratio = falling_ratio(losses)
        if ratio is not None:
            logger.info(
                "validation loss on the fixed draw: %.4f at the start, %.4f at the end; "
                "mean of the last 20 %% / mean of the first 20 %% = %.3f",
                losses[0], losses[-1], ratio,
            )  # fmt: skip
        best = lowest(state.validation_losses)
        if best is not None and self._keep is not None:
            said = "" if best[1] < losses[0] else f"; before training it was no worse, {losses[0]:.4f}"
            logger.info("lowest validation loss: %.4f at step %d%s", best[1], best[0], said)
        return state

    def _validate(self, state: TrainState) -> TrainState:
        with self._evaluating():
            measured = self._validator.measure()
        state = state.after_validation(measured.loss)
        best = is_best(state.validation_losses)
        logger.info(
            "step %d  validation loss %.4f (fixed draw)%s",
            state.step,
            measured.loss,
            ", the lowest" if best else "",
        )
        for tell in self._on_measured:
            tell(state, measured)
        if best and self._keep is not None:
            self._keep(state)
        if has_stalled(state.validation_losses, self._config):
            logger.info("%s", why_enough(state, self._config))
        return state


def why_enough(state: TrainState, config: ValidationConfig) -> str:
    """Why a run that has stalled ends."""
    best = lowest(state.validation_losses)
    where = f"; the lowest was {best[1]:.4f} at step {best[0]}" if best else ""
    least = f" by more than {config.early_stop_min_delta:g}" if config.early_stop_min_delta else ""
    return (
        f"early stop at step {state.step}: the validation loss has not fallen{least} in early_stop_patience = "
        f"{config.early_stop_patience} validations{where}"
    )
