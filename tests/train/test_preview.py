"""When samples are drawn, as the forecast says; what happens where ranks draw together and one picture fails."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from PIL import Image

from library.config.options import UNSET
from library.config.prompts import SamplePrompt
from library.config.sections.sampling import SamplingConfig
from library.config.sections.saving import SavingConfig
from library.config.train_config import OPTIONS, TrainConfig
from library.data.plan import Plan, PlannedImage, PlanSettings
from library.distributed.base import World
from library.distributed.single import SingleBackend
from library.files.comfyui import ModelNames, Scene
from library.preflight.writes import sample_times
from library.train.preview import PreviewListener
from library.train.state import TrainState
from library.train.trainer import StepReport

PLAN = Plan(
    tuple(PlannedImage(f"k{n}", 0, (64, 64), 1) for n in range(4)),
    PlanSettings(seed=0, batch_sizes=(1,), units_per_step=1, max_train_epochs=3),
)
REPORT = StepReport(loss=0.5, grad_norm=1.0, learning_rates={}, samples=1, seconds=0.1, skipped=False)


class Grey:
    """Draws grey; fails where it is told to."""

    def __init__(self, *, fails: str = "") -> None:
        self.fails, self.drawn = fails, list[int]()

    def latents(self, prompt: SamplePrompt) -> torch.Tensor:
        if self.fails == "latents":
            raise RuntimeError("no share of the weights came")
        self.drawn.append(prompt.index)
        return torch.zeros(1)

    def picture(self, latents: torch.Tensor) -> Image.Image:
        if self.fails == "picture":
            raise torch.OutOfMemoryError("too large")
        return Image.new("RGB", (8, 8))


def listener(folder: Path, painter: Grey, *, together: bool = False, **sampling: object) -> PreviewListener:
    world = World(rank=0, size=1, local_rank=0, device=torch.device("cpu"))
    backend = SingleBackend(world, dtype=torch.float32)
    backend.in_lockstep = together
    names = ModelNames(transformer="f", clip_l="c", t5="t", autoencoder="a", embeds_guidance=True)
    return PreviewListener(
        painter=painter,
        prompts=(SamplePrompt(index=0, prompt="a", seed=1), SamplePrompt(index=1, prompt="b")),
        config=TrainConfig(
            sampling=SamplingConfig(**sampling), saving=SavingConfig(output_dir=folder, output_name="o")
        ),
        evaluating=nullcontext,
        backend=backend,
        scene=lambda prompt, step: Scene(
            models=names, adapter=None, prompt=prompt, seed=step, keeps_seed=True, prefix="o", note=""
        ),
    )  # fmt: skip


def start() -> TrainState:
    return TrainState(step=0, seed=1, steps_per_epoch=4, plan_fingerprint="", session_id=1, started_at=0.0)


@pytest.mark.parametrize(
    ("sampling", "moments"),
    [
        ({"sample_every_n_steps": 5}, ["000005", "000010"]),
        ({"sample_every_n_epochs": 2}, ["e000002"]),
        ({"sample_every_n_epochs": 1, "sample_every_n_steps": 1}, ["e000001", "e000002", "e000003"]),
        ({"sample_at_first": True}, ["000000"]),
        ({"sample_at_first": True, "sample_every_n_steps": 6}, ["000000", "000006", "000012"]),
    ],
)
def test_pictures_are_drawn_when_the_forecast_says(
    tmp_path: Path, sampling: dict[str, object], moments: list[str]
):
    painter, state = Grey(), start()
    drawing = listener(tmp_path, painter, **sampling)
    drawing.on_start(state)
    for step in range(1, 13):
        state = state.after_step(loss=0.5, samples=1)
        drawing.on_step(state, REPORT)
        if step % 4 == 0:
            drawing.on_epoch(state, step // 4)
    drawing.on_end(state)
    found = sorted(path.name.split("_")[1] for path in (tmp_path / "sample").glob("o_*_00_*_1.png"))
    assert found == sorted(moments)
    forecast = sample_times(SamplingConfig(**sampling), PLAN, first_step=0)
    assert [f"{step:06d}" if epoch is None else f"e{epoch:06d}" for step, epoch in forecast] == moments
    assert painter.drawn == [0, 1] * len(moments)


def test_a_resumed_run_draws_no_first_samples(tmp_path: Path):
    painter = Grey()
    listener(tmp_path, painter, sample_at_first=True).on_start(start().after_step(loss=1.0, samples=1))
    assert painter.drawn == []


@pytest.mark.parametrize("name", ["sample_every_n_steps", "sample_every_n_epochs"])
def test_zero_and_less_mean_never(name: str):
    assert OPTIONS[name].read("0", "here") is UNSET
    assert OPTIONS[name].read(-1, "here") is UNSET


def test_a_picture_fails_alone_unless_other_ranks_wait_for_weights(tmp_path: Path, our_warnings: list[str]):
    for together, fails in ((False, "latents"), (False, "picture"), (True, "picture")):
        drawing = listener(tmp_path, Grey(fails=fails), together=together, sample_at_first=True)
        drawing.on_start(start())
        assert drawing.newest == ()
    assert len(our_warnings) == 6
    assert "sample prompt 2 was not drawn, and training goes on: OutOfMemoryError: too large" in our_warnings
    with pytest.raises(RuntimeError, match="no share of the weights"):
        listener(tmp_path, Grey(fails="latents"), together=True, sample_at_first=True).on_start(start())


def test_a_picture_that_cannot_be_written_is_a_warning(tmp_path: Path, our_warnings: list[str]):
    (tmp_path / "sample").write_text("a file where the folder should be")
    listener(tmp_path, Grey(), sample_at_first=True).on_start(start())
    assert len(our_warnings) == 2
    assert "could not be written" in our_warnings[0]
    assert "Training goes on" in our_warnings[0]
