"""One line at the first step: how long it took to get there, and with what."""

from __future__ import annotations

import logging

from library.startup import StartClock
from library.train.state import TrainState
from library.train.trainer import StepReport

logger = logging.getLogger(__name__)


class StartListener:
    """Says how long the start took. On every rank, so that all agree on waiting for the first step's numbers."""

    def __init__(self, clock: StartClock, *, first: int) -> None:
        self._clock, self._first = clock, first

    def on_start(self, state: TrainState) -> TrainState:
        self._clock.mark("setup")
        return state

    def wants_weights(self, step: int) -> bool:
        """At the first step: with a second one on its way the clock would run on."""
        return step == self._first

    def on_step(self, state: TrainState, report: StepReport) -> TrainState:
        del report
        if state.step == self._first:
            self._clock.mark("first step")
            logger.info("%s", self._clock.line())
        return state

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState:
        del epoch
        return state

    def on_end(self, state: TrainState) -> TrainState:
        return state
