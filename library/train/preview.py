"""Sample images while training: when they are due, who draws which, and what becomes of them.

Source: spec of sd-scripts, "Sampling during training". Ranks share the prompts out; network dropouts are off. A picture
that cannot be drawn or written costs a warning and never the run.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from pathlib import Path
from typing import Protocol

from PIL import Image
from PIL.Image import Image as Picture
from torch import Tensor

from library.config.prompts import SamplePrompt
from library.config.train_config import TrainConfig
from library.distributed.base import Backend
from library.errors import WriteFailed
from library.files.atomic import replacing
from library.files.comfyui import Scene
from library.files.picture_text import png_text
from library.files.refusals import refusals_named
from library.models.memory import free_memory
from library.train.naming import picture_name
from library.train.state import TrainState
from library.train.trainer import StepReport

logger = logging.getLogger(__name__)


class Painter(Protocol):
    """What draws: the part that runs the model, and the part that does not."""

    def latents(self, prompt: SamplePrompt) -> Tensor: ...

    def picture(self, latents: Tensor) -> Picture: ...


class PreviewListener:
    """Draws this rank's prompts when the options say so, into `<output_dir>/sample`."""

    def __init__(
        self,
        *,
        painter: Painter,
        prompts: Sequence[SamplePrompt],
        config: TrainConfig,
        # has the weights in place that are drawn with
        evaluating: Callable[[], AbstractContextManager[None]],
        backend: Backend,
        scene: Callable[[SamplePrompt, int], Scene],
        on_image: Callable[[SamplePrompt, Path, Picture, TrainState], None] | None = None,
    ) -> None:
        assert config.saving.output_dir is not None, "checked by the config rules"
        self._painter, self._prompts, self._config = painter, prompts, config.sampling
        self._folder, self._output_name = config.saving.output_dir / "sample", config.saving.output_name
        self._evaluating, self._backend, self._scene, self._on_image = evaluating, backend, scene, on_image
        self.newest: tuple[tuple[SamplePrompt, Path], ...] = ()  # of the last time, on the main rank

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
        world, together = self._backend.world, self._backend.in_lockstep
        when: datetime = self._backend.agree(datetime.now())  # so every rank knows the name of every picture
        paths = {
            prompt: self._folder
            / picture_name(prompt, output_name=self._output_name, epoch=epoch, step=state.step, when=when)
            for prompt in self._prompts
        }
        drawn: dict[SamplePrompt, Picture] = {}
        # Ranks share the prompts out, unless all of them are needed for each picture.
        for prompt in self._prompts if together else self._prompts[world.rank :: world.size]:
            picture = self._draw(prompt)
            if picture is not None:
                self._write(paths[prompt], picture, self._scene(prompt, state.step))
                drawn[prompt] = picture
        # Without a time limit, which gradients have: one rank may draw for long while others have nothing to draw.
        self._backend.wait(f"pictures of step {state.step}")
        if not world.is_main:
            return
        self.newest = tuple((prompt, path) for prompt, path in paths.items() if path.is_file())
        if self._on_image is not None:
            drawn |= {prompt: _opened(path) for prompt, path in self.newest if prompt not in drawn}
            for prompt, path in self.newest:
                self._on_image(prompt, path, drawn[prompt], state)

    def _draw(self, prompt: SamplePrompt) -> Picture | None:
        def denoise() -> Tensor:
            with self._evaluating():
                return self._painter.latents(prompt)

        if not self._backend.in_lockstep:
            return self._tried(lambda: self._painter.picture(denoise()), prompt)
        # A rank that fails while the others wait for its share of the weights ends the run.
        latents = denoise()
        if not self._backend.world.is_main:
            return None
        return self._tried(lambda: self._painter.picture(latents), prompt)

    def _tried(self, draw: Callable[[], Picture], prompt: SamplePrompt) -> Picture | None:
        """What `draw` returns, or None and a warning. The memory of a failed attempt is given back."""
        try:
            return draw()
        except Exception as error:  # noqa: BLE001 - whatever is wrong with a picture, training can go on
            logger.log(
                logging.WARNING if self._backend.world.is_main else logging.ERROR,  # others show no warnings
                "sample prompt %d was not drawn, and training goes on: %s: %s",
                prompt.index + 1, type(error).__name__, str(error).strip().split("\n", 1)[0],
            )  # fmt: skip
        free_memory()  # only now is nothing of it held by the error
        return None

    def _write(self, path: Path, picture: Picture, scene: Scene) -> None:
        try:
            with refusals_named(path), replacing(path) as temporary:
                picture.save(temporary, pnginfo=png_text(scene))
            logger.info("sample %s: %s", path, scene.prompt.prompt)
        except WriteFailed as error:
            logger.warning("%s Training goes on", error)


def _opened(path: Path) -> Picture:
    with Image.open(path) as picture:
        return picture.convert("RGB")
