"""Losses by picture: compared at equal noise levels, remembered, gathered; wrong captions found in a real run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux_train_network import main
from library.data.records import Batch
from library.distributed.base import World
from library.randomness import Visit
from library.train.image_losses import KEPT, LEAST_VISITS, LossByImage
from library.train.run_log import Outliers, read_log
from library.train.sample_losses import SampleLoss, SampleLosses
from tests.e2e.running import write_config

IMAGES = tuple(f"0/1_x/{number}.png" for number in range(12))


def losses(*, epochs: int, worse: dict[int, float]) -> LossByImage:
    """Pictures that all lose 1 + 20 t, some times a factor, at noise levels of their own."""
    kept, draw = LossByImage(IMAGES), np.random.default_rng(1)
    for epoch in range(epochs):
        times = draw.uniform(0.02, 0.98, len(IMAGES))
        noise = draw.normal(1, 0.05, len(IMAGES))
        kept.add(
            [SampleLoss(i, t, (1 + 20 * t) * noise[i] * worse.get(i, 1)) for i, t in enumerate(times)],
            epoch=epoch,
        )
    return kept


def test_a_picture_is_compared_with_others_at_its_noise_levels():
    found = losses(epochs=30, worse={3: 1.5, 7: 2.0}).outliers()
    assert [one.image for one in found] == [IMAGES[7], IMAGES[3]]
    assert found[0].score > found[1].score > 3.5
    # The two worse ones raise what is expected: 12 pictures, of mean 13.5 / 12.
    assert found[0].loss == pytest.approx(2.0 * 12 / 13.5, rel=0.1)
    assert all(one.visits == 30 for one in found)
    assert losses(epochs=30, worse={}).outliers() == ()


def test_a_low_noise_level_alone_is_no_merit():
    """One picture is only seen where all lose little, one only where all lose much."""
    kept, draw = LossByImage(IMAGES), np.random.default_rng(2)
    for epoch in range(20):
        times = [0.1, 0.9, *draw.uniform(0.02, 0.98, len(IMAGES) - 2)]
        kept.add([SampleLoss(i, t, 1 + 20 * t) for i, t in enumerate(times)], epoch=epoch)
    assert kept.ratios() == pytest.approx(np.ones(len(IMAGES)), abs=0.05)


def test_few_visits_and_few_pictures_say_nothing():
    assert losses(epochs=LEAST_VISITS - 1, worse={3: 9.0}).outliers() == ()
    assert [one.image for one in losses(epochs=LEAST_VISITS, worse={3: 9.0}).outliers()] == [IMAGES[3]]
    few = LossByImage(IMAGES[:7])
    for epoch in range(9):
        few.add([SampleLoss(i, 0.5, 9.0 if i == 3 else 1.0 + 0.01 * i) for i in range(7)], epoch=epoch)
    assert few.outliers() == ()


def test_old_epochs_count_less():
    kept = LossByImage(IMAGES)
    for epoch, loss in enumerate((3.0, 1.0, 1.0)):
        kept.add([SampleLoss(i, 0.5, loss if i == 0 else 1.0) for i in range(len(IMAGES))], epoch=epoch)
    weights = [KEPT**2, KEPT, 1.0]
    own = (3 * weights[0] + weights[1] + weights[2]) / sum(weights)
    usual = (own + len(IMAGES) - 1) / len(IMAGES)
    assert kept.ratios()[0] == pytest.approx(own / usual)


def test_the_state_goes_on_and_is_not_taken_from_other_pictures():
    first, other = losses(epochs=6, worse={3: 2.0}), LossByImage(IMAGES)
    other.load_state(first.state())
    for kept in (first, other):
        kept.add([SampleLoss(i, 0.3, 5.0) for i in range(len(IMAGES))], epoch=6)
    assert np.array_equal(first.ratios(), other.ratios())
    stranger = LossByImage((*IMAGES[:-1], "0/1_x/new.png"))
    stranger.load_state(first.state())
    assert np.isnan(stranger.ratios()).all()


def test_samples_of_all_ranks_meet_in_one_table():
    ranks = [SampleLosses(IMAGES, rows=3, world=World(r, 2, r, torch.device("cpu"))) for r in range(2)]
    for rank, (names, shares) in enumerate([
        ([IMAGES[4], "0/reg/9.png"], [0.25, 0.25]),  # a picture that is not watched
        ([IMAGES[2], IMAGES[5], IMAGES[2]], [0.25, 0.25, 0.0]),  # and one that only fills the batch
    ]):  # fmt: skip
        batch = Batch(
            visits=tuple(Visit(name, 0) for name in names), captions=tuple(names), latents=None, images=None, text=None,
            loss_weights=torch.ones(len(names)), shares=torch.tensor(shares), mask=None,
        )  # fmt: skip
        images, t = ranks[rank].images(batch), torch.full((len(names),), 0.5 + rank / 4)
        ranks[rank].note(images, t, torch.arange(1.0, 1 + len(names)))
    table = sum(rank.take() for rank in ranks)
    assert isinstance(table, torch.Tensor)
    assert ranks[0].read(table.tolist()) == (
        SampleLoss(2, 0.75, 1.0), SampleLoss(4, 0.5, 1.0), SampleLoss(5, 0.75, 2.0),
    )  # fmt: skip


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_waits_for_no_table():
    gpu = torch.device("cuda")
    losses = SampleLosses(IMAGES, rows=2, world=World(0, 1, 0, gpu))
    batch = Batch(
        visits=(Visit(IMAGES[3], 0), Visit(IMAGES[1], 0)), captions=("", ""), latents=None, images=None, text=None,
        loss_weights=torch.ones(2), shares=torch.tensor([0.5, 0.5]), mask=None,
    )  # fmt: skip
    t, lost = torch.tensor([0.25, 0.5], device=gpu), torch.tensor([1.0, 2.0], device=gpu)
    torch.cuda.set_sync_debug_mode("error")
    try:
        losses.note(losses.images(batch), t, lost)
        table = losses.take()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert losses.read(table.tolist()) == (SampleLoss(1, 0.5, 2.0), SampleLoss(3, 0.25, 1.0))


CAPTIONS = ("a ripe red apple on a white table", "city lights at night, from far away")
WRONG = {4, 15, 22}


def draw_two_kinds(folder: Path) -> None:
    """30 bright and dark pictures in turn, each with its kind's caption, but for three that have the other's."""
    folder.mkdir(parents=True)
    draw = np.random.default_rng(0)
    y, x = np.mgrid[0:64, 0:64] / 64
    for number in range(30):
        bright = number % 2 == 1
        colour = np.array((240, 200, 150) if bright else (20, 30, 70)) + draw.normal(0, 6, 3)
        stripes = 15 * np.sin(20 * (x if bright else y) + draw.uniform(0, 1))
        pixels = np.clip(colour + stripes[..., None], 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:02d}.png")
        caption = CAPTIONS[bright if number in WRONG else not bright]
        (folder / f"{number:02d}.txt").write_text(caption, encoding="utf-8")


def test_wrong_captions_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    draw_two_kinds(tmp_path / "data" / "1_kinds")
    config = write_config(
        tmp_path / "c.toml", tmp_path / "data", tmp_path / "out", train_batch_size=10, max_train_epochs=25,
        network_dim=32, network_alpha=32, learning_rate=4e-3, min_timestep=500, t5xxl_max_token_length=16, seed=8,
    )  # fmt: skip
    assert main(["--config_file", str(config)]) == 0
    ends = [
        r for line in read_log(tmp_path / "out" / "out-log.jsonl") if isinstance(r := line.record, Outliers)
    ]
    assert [end.epoch for end in ends] == list(range(1, 26))
    assert not ends[0].images
    found = {int(Path(one.image).stem) for one in ends[-1].images}
    assert found == WRONG
    assert all(one.image.startswith("0/1_kinds/") and one.visits == 25 for one in ends[-1].images)
    said = capsys.readouterr().err
    lines = [
        line for line in said.splitlines() if "at the same noise levels; do caption and picture fit?" in line
    ]
    assert lines
    assert all(f"1_kinds/{number:02d}.png" in lines[-1] for number in WRONG)
