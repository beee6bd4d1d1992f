"""Recorded training steps of the reference, replayed through the real trainer: losses, gradient norms, weights."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from library.adapters.flux import FluxAdapter, FluxTrainModule, ForwardSettings
from library.config.sections.network import NetworkConfig
from library.config.sections.objective import ObjectiveConfig
from library.config.sections.optimizer import OptimizerConfig
from library.config.sections.schedule import ScheduleConfig
from library.data.records import Batch, TextCond
from library.distributed.base import World
from library.distributed.single import SingleBackend
from library.flow.objective import Draw, Objective
from library.models.load import load_flux
from library.optim import factory, schedules
from library.randomness import Visit
from library.train.state import TrainState
from library.train.trainer import Limits, Trainer
from networks.interface import create

DATA = Path(__file__).resolve().parent.parent / "data"
# Of the largest gradient of a tensor: the reference's own distance from float64 is 6e-6 here, ours 9e-7.
GRADIENT_TOLERANCE = 1e-5
LORA_FLUX = NetworkConfig(
    network_module="networks.lora_flux", network_dim=4, network_alpha=2.0, network_train_unet_only=True,
    network_weights=DATA / "train" / "shift_start.safetensors",
)  # fmt: skip
LOKR = NetworkConfig(
    network_module="lycoris.kohya", network_dim=4, network_alpha=2.0, network_train_unet_only=True,
    network_args=("algo=lokr", "factor=4"), network_weights=DATA / "train" / "lokr_start.safetensors",
)  # fmt: skip


@dataclass(frozen=True)
class RecordedNoise(Objective):
    """The real objective, at the noise and the noise levels that the reference drew."""

    steps: tuple[tuple[Tensor, Tensor], ...]  # noise [B, 16, h, w] and levels [B] of each step

    def draw(self, latents: Tensor, visits: Sequence[Visit], *, seed: int) -> Draw:
        noise, levels = self.steps[visits[0].number]
        return self.at(latents, noise, levels)


def recorded(run: str) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """Steps of a run and the tensors that they name."""
    steps = json.loads((DATA / "train" / "replay.json").read_text())[run]["steps"]
    return steps, load_file(DATA / "train" / "replay.safetensors")


def trainer_of(run: str, network: NetworkConfig) -> tuple[Trainer, Iterator[Batch]]:
    """The trainer before the first of the recorded steps, and the micro-batches of all of them."""
    steps, tensors = recorded(run)

    def stacked(step: dict[str, Any], name: str) -> Tensor:
        return torch.stack([tensors[key] for key in step[name]])

    def batches() -> Iterator[Batch]:
        for number, step in enumerate(steps):
            text = TextCond(
                clip_pooled=stacked(step, "l_pooled"), t5_hidden=stacked(step, "t5_out"),
                t5_mask=stacked(step, "t5_attn_mask").long(),
            )  # fmt: skip
            size = len(step["sigmas"])
            yield Batch(
                visits=tuple(Visit(f"0/recorded/{index}", number) for index in range(size)),
                captions=("",) * size, latents=stacked(step, "latents"), images=None, text=text,
                loss_weights=torch.ones(size), shares=torch.full((size,), 1 / size), mask=None,
            )  # fmt: skip

    transformer = load_flux(DATA / "models" / "flux.safetensors")
    transformer.requires_grad_(False)
    handle = create(network, text_encoders=[], transformer=transformer)
    handle.apply()
    groups = handle.parameter_groups(learning_rate=1e-2, unet_lr=None, text_encoder_lr=None)
    optimizer = factory.build(OptimizerConfig(optimizer_type="AdamW", learning_rate=1e-2), groups)
    schedule = schedules.build(ScheduleConfig(), optimizer, base_lr=1e-2, total_steps=len(steps))
    root = FluxTrainModule(
        transformer=transformer, network=handle.module, clip_l=None, t5=None,
        settings=ForwardSettings(guidance_scale=1.0, apply_t5_attn_mask=run == "replay_t5mask", autocast_dtype=None),
    )  # fmt: skip
    cpu = torch.device("cpu")
    trainer = Trainer(
        module=root.train(),
        adapter=FluxAdapter(device=cpu, tokenizers=None, encode_images=None, seed=0),
        network=handle,
        parameters=[p for group in optimizer.optimizer.param_groups for p in group["params"]],
        objective=RecordedNoise(
            ObjectiveConfig(model_prediction_type="raw"),
            tuple((stacked(step, "noise"), torch.tensor(step["sigmas"])) for step in steps),
        ),
        optimizer=optimizer,
        schedule=schedule,
        backend=SingleBackend(World(rank=0, size=1, local_rank=0, device=cpu), dtype=torch.float32),
        limits=Limits(total_steps=len(steps), micro_steps=1, max_grad_norm=1.0, scale_weight_norms=None),
        listeners=(),
        state=TrainState(
            step=0, seed=0, steps_per_epoch=len(steps), plan_fingerprint="", session_id=0, started_at=0.0
        ),
        should_stop=lambda: False,
    )
    return trainer, batches()


def size(tensors: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(tensor.double().square().sum()) for tensor in tensors.values()))


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    return size({key: first[key].double() - second[key].double() for key in second})


@pytest.mark.parametrize(
    ("run", "network", "final", "tolerance"),
    [
        ("replay_shift", LORA_FLUX, "shift_final", 1e-5),
        ("replay_t5mask", LORA_FLUX, None, 0.0),
        ("replay_lokr", LOKR, "lokr_final", 3e-5),
    ],
)
def test_the_steps_of_the_reference_come_out(
    run: str, network: NetworkConfig, final: str | None, tolerance: float, tmp_path: Path
):
    trainer, batches = trainer_of(run, network)
    for step in recorded(run)[0]:
        report, _ = trainer.optimizer_step(batches)
        assert report.loss == pytest.approx(step["loss"], rel=1e-5)
        assert report.grad_norm == pytest.approx(step["grad_norm"], rel=1e-4)
    if final is None:
        return
    trainer.network.save(tmp_path / "final.safetensors", dtype=torch.float32, metadata=None)
    ours = load_file(tmp_path / "final.safetensors")
    theirs = load_file(DATA / "train" / f"{final}.safetensors")
    start = load_file(str(network.network_weights))
    assert ours.keys() == theirs.keys()
    # Over all numbers together: AdamW steps by the sign of a gradient however small, so where the reference's gradient
    # is mostly rounding (some 200 of 33,000 numbers) a single number says nothing.
    assert distance(ours, theirs) < tolerance * size(theirs)
    assert distance(start, theirs) > 0.05 * size(theirs), "the steps moved too little to prove anything"


@pytest.mark.parametrize(
    ("run", "network", "name"), [("replay_shift", LORA_FLUX, "shift"), ("replay_lokr", LOKR, "lokr")]
)
def test_the_first_gradients_are_those_of_the_reference(run: str, network: NetworkConfig, name: str):
    trainer, batches = trainer_of(run, network)
    trainer.micro_step(next(batches))
    ours = {key: parameter.grad for key, parameter in trainer.network.module.named_parameters()}
    theirs = load_file(DATA / "train" / f"{name}_gradients.safetensors")
    assert ours.keys() == theirs.keys()
    for key, expected in theirs.items():
        gradient = ours[key]
        assert gradient is not None
        assert float((gradient - expected).abs().max()) <= GRADIENT_TOLERANCE * float(expected.abs().max()), (
            key
        )


def test_preserved_samples_are_trained_towards_the_frozen_model():
    """diff_output_preservation: the target is the answer without the network, and no gradient flows through it."""
    trainer, batches = trainer_of("replay_shift", LORA_FLUX)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in trainer.parameters:
            parameter.add_(torch.randn_like(parameter) * 0.05)
    batch = replace(next(batches), preserve=torch.tensor([True, False]))
    inputs = trainer.adapter.inputs(batch)
    draw = trainer.objective.draw(inputs.latents, batch.visits, seed=0)
    with torch.no_grad():
        trained = trainer.module(draw.x_t, draw.t, inputs.cond)
        trainer.network.set_multiplier(0.0)
        frozen = trainer.module(draw.x_t, draw.t, inputs.cond)
        trainer.network.set_multiplier(1.0)
    expected = ((trained[0] - frozen[0]).square().mean() + (trained[1] - draw.target[1]).square().mean()) / 2
    assert float(trainer.micro_step(batch)) == pytest.approx(float(expected), rel=1e-5)
    both = [p.grad.clone() for p in trainer.parameters if p.grad is not None]
    # The second sample's own gradient and the first one's towards a fixed target add up to it.
    for p in trainer.parameters:
        p.grad = None
    prediction = trainer.module(draw.x_t, draw.t, inputs.cond)
    target = torch.stack([frozen[0], draw.target[1]])
    ((prediction - target).square().mean(dim=(1, 2, 3)).sum() / 2).backward()
    for found, wanted in zip(both, (p.grad for p in trainer.parameters), strict=True):
        torch.testing.assert_close(found, wanted)
