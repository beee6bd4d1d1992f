"""kill -9 at a hundred random moments of saving: what `--resume auto` finds is whole, and no older than it must be."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from library.config.sections.network import NetworkConfig
from library.config.sections.optimizer import OptimizerConfig
from library.config.sections.saving import SavingConfig
from library.config.sections.schedule import ScheduleConfig
from library.distributed.base import World
from library.distributed.single import SingleBackend
from library.optim import factory, schedules
from library.train.checkpoint import load_run, newest_run, what_is_wrong
from library.train.naming import step_save
from library.train.resume import Resumable, capture
from library.train.saving import About, Saver, Weights
from library.train.state import TrainState
from networks.interface import NetworkHandle, create
from tests.networks.tiny_models import TinyFlux

KILLS = 100


class Run:
    """The parts of a run that saving asks, on a network whose numbers all say the step; a step is a save here."""

    def __init__(self, folder: Path) -> None:
        self.config = SavingConfig(
            output_dir=folder, output_name="out", save_every_n_steps=1, save_last_n_steps=2, save_state=True
        )
        transformer = TinyFlux()
        settings = NetworkConfig(network_module="networks.lora_flux", network_dim=32, network_alpha=1.0)
        self.network: NetworkHandle = create(settings, text_encoders=[], transformer=transformer)
        self.network.apply()
        groups = self.network.parameter_groups(learning_rate=1e-3, unet_lr=None, text_encoder_lr=None)
        self.optimizer = factory.build(OptimizerConfig(optimizer_type="AdamW", learning_rate=1e-3), groups)
        self.backend = SingleBackend(World(0, 1, 0, torch.device("cpu")), dtype=torch.float32)
        schedule = schedules.build(ScheduleConfig(), self.optimizer, base_lr=1e-3, total_steps=10**6)
        self.parts = Resumable(
            network=self.network.module, optimizer=self.optimizer, schedule=schedule, backend=self.backend
        )
        for parameter in self.network.trainable_parameters():
            parameter.grad = torch.ones_like(parameter)
        self.optimizer.optimizer.step()  # or there were no optimizer state to save

    def save_from(self, step: int) -> Iterator[int]:
        """Begin a process's part of the run, and yield each step that is saved."""
        saver = Saver(
            config=self.config, capture=lambda now: capture(now, self.parts), backend=self.backend,
            weights=Weights(self.network, self.optimizer.evaluating, None, judged_by_ema=False),
            about=About(lambda state, epoch: {"ss_steps": str(state.step)}, lambda path: {"of": path.name}),
        )  # fmt: skip
        while True:
            step += 1
            for parameter in self.network.trainable_parameters():
                nn.init.constant_(parameter, step)
            point = step_save(self.config, step=step)
            assert point is not None
            saver.at(point, state_at(step), epoch=1)
            yield step


def steps_in(network: Mapping[str, Tensor]) -> set[float]:
    """All numbers of a network's weights: one, the step, where it is of one moment."""
    return {
        float(value) for name, tensor in network.items() if "alpha" not in name for value in tensor.unique()
    }


def state_at(step: int) -> TrainState:
    return TrainState(
        step=step, seed=1, steps_per_epoch=10**6, plan_fingerprint="", session_id=1, started_at=0.0
    )


def killed_after(run: Run, seconds: float, *, step: int) -> int:
    """Save from `step` on in a process that is killed after `seconds`; the last step that it had saved."""
    told, tell = os.pipe()
    process = os.fork()
    if process == 0:
        try:
            for saved in run.save_from(step):
                os.write(tell, saved.to_bytes(4, "little"))
        finally:
            os._exit(1)
    time.sleep(seconds)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    os.close(tell)
    with os.fdopen(told, "rb") as file:
        steps = file.read()
    return int.from_bytes(steps[-4:], "little") if steps else step


def test_a_hundred_kills_leave_a_whole_state_each_time(tmp_path: Path, our_warnings: list[str]):
    run, chance = Run(tmp_path), random.Random(5)
    saves = run.save_from(0)
    began = time.monotonic()
    step = [next(saves) for _ in range(4)][-1]
    one_save = (time.monotonic() - began) / 4
    halves = 0
    for _ in range(KILLS):
        saved = killed_after(run, chance.uniform(0.2, 3.0) * one_save, step=step)
        newest = newest_run(tmp_path, "out")
        assert newest is not None
        found = load_run(newest)  # which compares hashes
        assert saved <= found.state.step <= saved + 1
        assert steps_in(found.network) == {found.state.step}
        step = found.state.step
        # Nothing that looks like a state or a file is half of one.
        assert not [folder for folder in tmp_path.glob("[!.]*-state*") if what_is_wrong(folder)]
        for file in tmp_path.glob("[!.]*.safetensors"):
            assert steps_in(load_file(file)) == {int(file.stem.removeprefix("out-step"))}
        halves += bool(list(tmp_path.glob(".*")))
    assert halves > KILLS / 4, "hardly a kill met a save"
    assert not our_warnings
    next(run.save_from(step))
    assert not list(tmp_path.glob(".*"))
