"""Names the pictures whose loss stands out, at the end of an epoch."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence

from library.data.problems import shown
from library.train.image_losses import LossByImage
from library.train.run_log import Outlier, Outliers
from library.train.state import TrainState
from library.train.trainer import StepReport

logger = logging.getLogger(__name__)


class OutlierListener:
    """Names the outliers at the end of an epoch, when they are not those of the epoch before. Of one rank."""

    def __init__(self, losses: LossByImage, *, record: Callable[[Outliers], None]) -> None:
        self._losses, self._record = losses, record
        self._named: frozenset[str] = frozenset()

    def on_start(self, state: TrainState) -> TrainState:
        return state

    def wants_weights(self, step: int) -> bool:
        """Never: it reads losses."""
        del step
        return False

    def on_step(self, state: TrainState, report: StepReport) -> TrainState:
        self._losses.add(report.sample_losses, epoch=(state.step - 1) // state.steps_per_epoch)
        return state

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState:
        found = self._losses.outliers()
        self._record(Outliers(step=state.step, epoch=epoch, images=found))
        names = frozenset(one.image for one in found)
        if names != self._named:
            self._named = names
            logger.info("epoch %d: %s", epoch, _sentence(found))
        return state

    def on_end(self, state: TrainState) -> TrainState:
        return state


def _sentence(found: Sequence[Outlier]) -> str:
    if not found:
        return "no picture's loss stands out any more"
    named = [f"{one.image.partition('/')[2]} ({one.loss:.2f} x the usual)" for one in found]
    count = "1 picture loses" if len(found) == 1 else f"{len(found)} pictures lose"
    return f"{count} far more than the others at the same noise levels; do caption and picture fit? {shown(named)}"
