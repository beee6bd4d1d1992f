"""Runs cut off and gone on with by other ranks: the steps of a run that nothing disturbed, to the last number."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flux_train_network import main
from library.train.checkpoint import newest_run
from library.train.trainer import Trainer
from tests.distributed.ranks import start
from tests.distributed.recorder import recorded, steps_of
from tests.e2e.running import draw_pictures, write_config

ZERO2 = {"deepspeed": True, "zero_stage": 2}
STEPS: dict[str, object] = {
    "max_train_epochs": None, "global_batch_size": 6, "train_batch_size": 2, "resolution": "32,32", "network_dim": 2,
    "t5xxl_max_token_length": 16, "network_dropout": 0.1, "shuffle_caption": True, "text_cache_variants": 4,
    "lr_scheduler": "cosine", "lr_warmup_steps": 5, "learning_rate": 1e-3, "save_state": True, "save_last_n_steps": 10,
    "cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True,
}  # fmt: skip


def kill(trainer: Trainer) -> None:
    """kill -9, as the machine does that lacks memory."""
    del trainer
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(trainer: Trainer) -> None:
    """SIGTERM, as a cluster sends it before it takes the machine away."""
    del trainer
    signal.raise_signal(signal.SIGTERM)


def spoil(trainer: Trainer) -> None:
    """A loss that is not finite, on this rank alone: a number of the frozen model is not."""
    with torch.no_grad():
        next(one for one in trainer.module.parameters() if not one.requires_grad).fill_(float("nan"))


def exhaust(trainer: Trainer) -> None:
    """More than there is of memory, of which torch says so in its own words."""
    del trainer
    torch.empty(2**50)


def ask_to_stop(trainer: Trainer) -> None:
    """SIGUSR1, as Slurm sends it some time before the end of a job."""
    del trainer
    signal.raise_signal(signal.SIGUSR1)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Fifteen samples an epoch in three buckets, in batches of two: short batches, short steps, idle ranks."""
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "2_same", [(64, 64)] * 4)
    draw_pictures(folder / "1_wide", [(96, 64)] * 4)
    draw_pictures(folder / "1_tall", [(64, 96)] * 3)
    for file in folder.rglob("*.txt"):
        file.write_text(f"{file.stem}, waves, colours, round, bright", encoding="utf-8")
    return folder


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """L2 norm of the difference, of that of `second`."""
    assert first.keys() == second.keys()
    pairs = [(first[key].double(), second[key].double()) for key in second]
    apart = sum(float((a - b).square().sum()) for a, b in pairs)
    return (apart / sum(float(b.square().sum()) for _, b in pairs)) ** 0.5


def assert_alike(found: dict[int, Any], expected: dict[int, Any], steps: range) -> None:
    assert set(found) == set(steps)
    for step in steps:
        assert found[step] == expected[step], step


def test_a_run_goes_on_under_zero_one_process_and_ddp_as_if_nothing_had_ended_it(
    tmp_path: Path, pictures: Path
):
    """100 steps: 37 on two ranks until one is killed, up to 78 on one until SIGTERM, the rest on three."""

    def config(name: str, **changes: object) -> str:
        options = {**STEPS, "max_train_steps": 100, "save_every_n_steps": 10, **changes}
        return str(write_config(tmp_path / f"{name}.toml", pictures, tmp_path / name, **options))

    with recorded(tmp_path / "whole steps"):
        assert main(["--config_file", config("whole")]) == 0
    whole = steps_of(tmp_path / "whole steps")
    assert set(whole) == set(range(1, 101))
    assert len({step["rates"]["unet"] for step in whole.values()}) > 90

    def leg(name: str, ranks: int, blows: dict[Any, Any], **changes: object) -> tuple[list[int | None], str]:
        running = start(
            ["--config_file", config("cut", **changes), "--resume", "auto"],
            ranks=ranks, screens=tmp_path / name, around=partial(recorded, tmp_path / name, blows),
        )  # fmt: skip
        return running.ended(patience=0.0 if kill in blows.values() else 20.0), running.said()

    codes, _ = leg("first", 2, {(1, 38): kill}, **ZERO2)
    assert codes[1] == -signal.SIGKILL
    assert_alike(steps_of(tmp_path / "first"), whole, range(1, 38))

    # What came after the last state is done again.
    codes, said = leg("second", 1, {(0, 78): terminate})
    assert codes == [4], said
    assert "at step 30" in said
    steps = steps_of(tmp_path / "second")
    stopped = max(steps)
    assert stopped in (78, 79)  # a step that was launched ahead is still done
    assert_alike(steps, whole, range(31, stopped + 1))
    assert f"stopped at step {stopped} of 100" in said

    codes, said = leg("third", 3, {})
    assert codes == [0, 0, 0], said
    assert f"at step {stopped}" in said
    assert_alike(steps_of(tmp_path / "third"), whole, range(stopped + 1, 101))
    ends = [load_file(tmp_path / name / "out.safetensors") for name in ("cut", "whole")]
    apart = distance(*ends)
    assert apart < 1e-4


@pytest.mark.parametrize("backend", [{}, ZERO2], ids=["ddp", "zero2"])
def test_the_same_ranks_come_to_the_same_bits(tmp_path: Path, pictures: Path, backend: dict[str, object]):
    """Two ranks that nothing disturbs, and two that meet one trouble after the other, with states at 5, 10 and 15."""
    said = ""

    def run(name: str, *folders: str, blows: dict[Any, Any]) -> list[int | None]:
        nonlocal said
        options = {**STEPS, **backend, "max_train_steps": 16, "save_every_n_steps": 5}
        config = write_config(tmp_path / f"{name}.toml", pictures, tmp_path / name, **options)
        running = start(
            ["--config_file", str(config), "--resume", "auto"],
            ranks=2, screens=tmp_path / "screens", around=partial(recorded, tmp_path.joinpath(*folders), blows),
        )  # fmt: skip
        codes = running.ended(patience=0.0 if kill in blows.values() else 20.0)
        said = running.said()
        return codes

    def cut(name: str, **blow: Any) -> list[int | None]:
        return run("cut", name, blows={(blow["rank"], blow["step"]): blow["what"]} if blow else {})

    assert run("whole", "steps", blows={}) == [0, 0]
    assert cut("killed", rank=0, step=8, what=kill)[0] == -signal.SIGKILL
    # Rank 1 has begun the next step while rank 0 writes that state.
    assert cut("not finite", rank=1, step=11, what=spoil) == [3, 3]
    assert "at step 5" in said
    assert cut("no memory", rank=1, step=13, what=exhaust)[1] == 6
    assert "at step 10" in said
    assert cut("asked", rank=1, step=14, what=ask_to_stop) == [4, 4]
    # A rank that holds all there is keeps what is done; under ZeRO the last save point has to do.
    assert f"at step {10 if backend else 12}" in said
    assert cut("to the end") == [0, 0]
    assert "at step 14" in said
    assert cut("again") == [0, 0], "nothing is left to do, on any rank"
    states = [load_file(tmp_path / name / "out-state" / "optimizer.safetensors") for name in ("cut", "whole")]
    files = [load_file(tmp_path / name / "out.safetensors") for name in ("cut", "whole")]
    for found, whole in (states, files):
        assert found.keys() == whole.keys()
        assert all(torch.equal(found[key], whole[key]) for key in whole)


def test_killed_in_the_middle_of_saves_and_done_again_to_the_same_bits(tmp_path: Path, pictures: Path):
    options = {**STEPS, "max_train_steps": 12, "save_every_n_steps": 1}
    whole, cut = (
        str(write_config(tmp_path / f"{name}.toml", pictures, tmp_path / name, **options))
        for name in ("whole", "cut")
    )
    assert main(["--config_file", whole]) == 0
    output, chance, met = tmp_path / "cut", random.Random(3), 0
    for number in range(4):
        running = start(["--config_file", cut, "--resume", "auto"], ranks=1, screens=tmp_path / "screens")
        steps = len(list(output.glob("out-*-state")))
        while len(list(output.glob("out-*-state"))) == steps and running.processes[0].is_alive():
            time.sleep(0.001)
        time.sleep(chance.uniform(0, 0.1))
        while not (halves := list(output.glob(".*.tmp"))) and running.processes[0].is_alive():
            pass
        running.kill()
        met += bool(halves)
        assert newest_run(output, "out") is not None, number
    assert met == 4, "it was over before it was killed"
    assert main(["--config_file", cut, "--resume", "auto"]) == 0
    assert not list(output.glob(".*"))
    for name in ("out.safetensors", "out-state/optimizer.safetensors"):
        found, expected = load_file(output / name), load_file(tmp_path / "whole" / name)
        assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("ahead", [True, False], ids=["queued ahead", "read at once"])
def test_a_picture_that_is_gone_costs_the_step_in_hand(tmp_path: Path, pictures: Path, ahead: bool):
    shutil.copytree(pictures, tmp_path / "data")
    picture, aside = tmp_path / "data" / "2_same" / "picture1.png", tmp_path / "aside.png"
    options = {
        **STEPS, "save_state": None, "cache_latents": False, "cache_latents_to_disk": False, "max_train_steps": 12,
        "optimizer_args": [f"fused={ahead}"],
    }  # fmt: skip
    cut, whole = (
        str(write_config(tmp_path / f"{name}.toml", tmp_path / "data", tmp_path / name, **options))
        for name in ("cut", "whole")
    )
    seen = []

    def take(trainer: Trainer) -> None:
        seen.append(trainer.runs_ahead)
        picture.rename(aside)

    with recorded(tmp_path / "first", {(0, 5): take}):
        assert main(["--config_file", cut]) == 2
    assert seen == [ahead]
    done = max(steps_of(tmp_path / "first"))
    assert 4 <= done < 12
    (state,) = (tmp_path / "cut").glob("*-state")
    assert state.name == f"out-step{done:08d}-state"
    aside.rename(picture)
    assert main(["--config_file", cut, "--resume", "auto"]) == 0
    assert main(["--config_file", whole]) == 0
    found, expected = (load_file(tmp_path / name / "out.safetensors") for name in ("cut", "whole"))
    assert all(torch.equal(found[key], expected[key]) for key in expected)
