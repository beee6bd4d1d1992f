"""Sample images while training: when they are due, who draws which, and how the files are called.

Source: spec of sd-scripts, "Sampling during training". Ranks share the prompts out; network dropouts are off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path

from PIL.Image import Image

from library.adapters.sampling import sample_file_name
from library.config.prompts import SamplePrompt
from library.config.sections.sampling import SamplingConfig
from library.errors import WriteFailed
from library.files.atomic import replacing
from library.files.refusals import refusals_named
from library.train.state import TrainState
from library.train.trainer import StepReport

logger = logging.getLogger(__name__)


class PreviewListener:
    """Draws this rank's prompts when the options say so, into `<output_dir>/sample`."""

    def __init__(
        self,
        *,
        draw: Callable[[SamplePrompt], Image],
        prompts: Sequence[SamplePrompt],
        config: SamplingConfig,
        folder: Path | None,  # None: another rank writes what this one helps to draw
        output_name: str | None,
        evaluating: Callable[
            [], AbstractContextManager[None]
        ],  # has the weights in place that are drawn with
        on_image: Callable[[SamplePrompt, Path, Image, TrainState], None] | None = None,
    ) -> None:
        self._evaluating, self._on_image = evaluating, on_image
        self._draw, self._folder, self._output_name = draw, folder, output_name
        self._prompts, self._config = prompts, config

    def on_start(self, state: TrainState) -> TrainState:
        if self._config.sample_at_first and state.step == 0:
            self._draw_all(state, epoch=None)
        return state

    def wants_weights(self, step: int) -> bool:
        """Where it draws."""
        every = self._config.sample_every_n_steps
        return bool(every and not self._config.sample_every_n_epochs and step % every == 0)

    def on_step(self, state: TrainState, report: StepReport) -> TrainState:
        del report
        if self.wants_weights(state.step):
            self._draw_all(state, epoch=None)
        return state

    def on_epoch(self, state: TrainState, epoch: int) -> TrainState:
        every = self._config.sample_every_n_epochs
        if every and epoch % every == 0:
            self._draw_all(state, epoch=epoch)
        return state

    def on_end(self, state: TrainState) -> TrainState:
        return state

    def _draw_all(self, state: TrainState, *, epoch: int | None) -> None:
        for prompt in self._prompts:
            with self._evaluating():
                image = self._draw(prompt)
            if self._folder is None:
                continue
            name = sample_file_name(
                prompt, output_name=self._output_name, epoch=epoch, step=state.step, when=datetime.now()
            )
            try:
                with refusals_named(self._folder / name), replacing(self._folder / name) as temporary:
                    image.save(temporary)
                logger.info("sample %s: %s", self._folder / name, prompt.prompt)
            except WriteFailed as error:
                logger.warning("%s Training goes on", error)
            if self._on_image is not None:
                self._on_image(prompt, self._folder / name, image, state)
