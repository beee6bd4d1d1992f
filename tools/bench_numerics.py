"""How far products in 8 bits carry a LoRA's gradients and its loss from those in bf16, at the size of FLUX.1-dev.

    python -m tools.bench_numerics --json numerics.jsonl                      # gradients, fp8 and int8
    python -m tools.bench_numerics --curve 300 --kinds bf16 fp8 --compile_blocks on --json numerics.jsonl
    python -m tools.bench_numerics --size tiny --resolution 64x64     # on a CPU

All kinds see the same random weights, samples, noise and timesteps. Gradients are compared by the cosine of each
LoRA tensor with the one in bf16, with up weights of zero, as a run begins (then only those have a gradient), and
with random ones. Curves are the losses of two whole trainings on a few fixed samples, each smoothed over 20 steps.
`control` is bf16 again with the adapter beside its layer: what another order of roundings does by itself. Options
that are not the tool's own are the trainer's. Random weights are the hard case: nothing in them has learned to damp
an error.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from library.config.train_config import TrainConfig
from library.data.records import Batch
from library.log import setup_logging
from library.models.memory import free_memory
from library.models.params import FluxParams
from library.train.setup import batches, connected
from library.train.trainer import Trainer
from networks.interface import NetworkHandle
from tools.bench_data import SIZES
from tools.bench_train import assemble, parse

KINDS: Mapping[str, tuple[str, ...]] = {
    "bf16": ("--base_compute", "bf16", "--join_adapter", "on"),
    "control": ("--base_compute", "bf16", "--join_adapter", "off"),
    "fp8": ("--base_compute", "fp8", "--join_adapter", "on"),
    "int8": ("--base_compute", "int8", "--join_adapter", "on"),
}
WINDOW = 20  # steps that a loss is smoothed over
UP_DEVIATION = 0.02  # of random up weights; a step of 1e-4 gets there in some hundred


@dataclass(frozen=True)
class Differentiated:
    """What a few samples gave."""

    predictions: list[Tensor]  # by sample, float32 on the CPU
    gradients: dict[str, Tensor]  # summed over samples, by name of the tensor; float32 on the CPU


def group_of(name: str) -> str:
    """A tensor's kind of layer: `double img_attn_qkv up` in any block."""
    layer = re.sub(r"_blocks_\d+_", " ", name.removeprefix("lora_unet_"))
    return layer.removesuffix(".weight").replace(".lora_", " ")


@torch.no_grad()
def randomise_up(network: NetworkHandle) -> None:
    """Normal up weights, the same in every call."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.module.named_parameters():
        if "up" in name.rpartition("lora_")[2]:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * UP_DEVIATION)


def differentiate(
    trainer: Trainer, stream: Iterator[Batch], network: NetworkHandle, *, samples: int
) -> Differentiated:
    """Forward and backward of so many micro-batches, no update."""
    predictions: list[Tensor] = []
    for _ in range(samples):
        batch = next(stream)
        inputs = trainer.adapter.inputs(batch)
        draw = trainer.objective.draw(inputs.latents, batch.visits, seed=trainer.state.seed)
        prediction = trainer.module(draw.x_t, draw.t, inputs.cond)
        loss = (trainer.objective.loss(prediction, draw, inputs.mask) * inputs.sample_weights).sum()
        trainer.backend.backward(loss)
        predictions.append(prediction.detach().float().cpu())
    gradients = {
        name: parameter.grad.detach().float().cpu().clone()
        for name, parameter in network.module.named_parameters()
        if parameter.grad is not None
    }
    network.module.zero_grad(set_to_none=True)
    return Differentiated(predictions, gradients)


def cosine(one: Tensor, other: Tensor) -> float:
    """Of two tensors as vectors; 1 where both are zero."""
    one, other = one.flatten().double(), other.flatten().double()
    norms = float(one.norm() * other.norm())
    if norms == 0:
        return float(bool((one == other).all()))
    return float(one @ other) / norms


def compared(found: Differentiated, reference: Differentiated) -> dict[str, Any]:
    """Cosines by group and in all, and how far the predictions are."""
    groups: dict[str, list[str]] = {}
    for name, gradient in reference.gradients.items():
        if bool(gradient.any()):  # a down weight has none while its up weight is zero
            groups.setdefault(group_of(name), []).append(name)
    by_group = {}
    for group, names in groups.items():
        together = [torch.cat([side.gradients[n].flatten() for n in names]) for side in (found, reference)]
        cosines = [cosine(found.gradients[name], reference.gradients[name]) for name in names]
        by_group[group] = {
            "cosine": round(cosine(*together), 5),
            "median": round(statistics.median(cosines), 5),
            "least": round(min(cosines), 5),
        }
    errors = [
        float((one - other).norm() / other.norm())
        for one, other in zip(found.predictions, reference.predictions, strict=True)
    ]
    return {
        "least_cosine_of_a_group": min(numbers["cosine"] for numbers in by_group.values()),
        "least_cosine_of_a_tensor": min(numbers["least"] for numbers in by_group.values()),
        "forward_relative_error": [round(error, 5) for error in errors],
        "groups": by_group,
    }


def gradients(
    configs: Mapping[str, TrainConfig], params: FluxParams, size: tuple[int, int], *, samples: int
) -> dict[str, Any]:
    """Each kind against the first, one model in memory at a time."""
    found: dict[str, dict[str, Differentiated]] = {}
    for kind, config in configs.items():
        with connected(config) as backend:
            job, trained, trainer = assemble(config, backend, params, [size], images=samples)
            stream = batches(job)
            zero = differentiate(trainer, stream, trained.network, samples=samples)
            randomise_up(trained.network)
            random = differentiate(trainer, stream, trained.network, samples=samples)
        found[kind] = {"up_zero": zero, "up_random": random}
        del job, trained, trainer, stream
        _forget()
    first, *others = found
    return {
        kind: {case: compared(made, found[first][case]) for case, made in found[kind].items()}
        for kind in others
    }


def _forget() -> None:
    """Give back the last model's memory, and what was compiled for it."""
    torch.compiler.reset()
    free_memory()


def smoothed(losses: Sequence[float]) -> list[float]:
    """Means of `WINDOW` losses, or of as many as there are, ending at each step."""
    return [statistics.fmean(losses[max(0, end - WINDOW) : end]) for end in range(1, len(losses) + 1)]


def curves(
    configs: Mapping[str, TrainConfig], params: FluxParams, size: tuple[int, int], *, samples: int, steps: int
) -> dict[str, Any]:
    """Losses of a training of each kind, and how far they are from the first's."""
    losses: dict[str, list[float]] = {}
    for kind, config in configs.items():
        with connected(config) as backend:
            job, trained, trainer = assemble(config, backend, params, [size], images=samples)
            reports = trainer.steps(batches(job))
            losses[kind] = [next(reports).loss for _ in range(steps)]
            reports.close()
        del job, trained, trainer, reports
        _forget()
    first, *others = losses
    reference = smoothed(losses[first])
    result: dict[str, Any] = {"losses": {kind: [round(x, 5) for x in line] for kind, line in losses.items()}}
    for kind in others:
        pairs = list(zip(smoothed(losses[kind]), reference, strict=True))[min(WINDOW, steps) - 1 :]
        differences = [abs(one - other) / other for one, other in pairs]
        result[kind] = {
            "largest_relative_difference": round(max(differences), 5),
            "last_relative_difference": round(differences[-1], 5),
        }
    return result


def brief(result: dict[str, Any]) -> dict[str, Any]:
    """A result without what fills the screen: single groups and losses."""
    left = {key: value for key, value in result.items() if key not in ("groups", "losses")}
    return {key: brief(value) if isinstance(value, dict) else value for key, value in left.items()}


def main(argv: Sequence[str] | None = None) -> int:
    """Compare gradients, or curves with --curve; print and keep the result."""
    given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="dev", help="size of the transformer")
    parser.add_argument(
        "--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="the others are held against the first"
    )
    parser.add_argument("--resolution", default="1024x1024", metavar="WxH", help="of the samples")
    parser.add_argument("--samples", type=int, default=4, help="different ones")
    parser.add_argument(
        "--curve", type=int, metavar="STEPS", help="train so long instead of comparing gradients"
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="append the whole result as one line of JSON"
    )
    own, rest = parser.parse_known_args(given)
    setup_logging(is_main=True, console=Console(stderr=True), simple=True)
    size = (int(own.resolution.partition("x")[0]), int(own.resolution.partition("x")[2]))
    configs = {kind: parse([*rest, *KINDS[kind]])[1] for kind in own.kinds}
    params = SIZES[own.size]
    made = (
        curves(configs, params, size, samples=own.samples, steps=own.curve)
        if own.curve
        else gradients(configs, params, size, samples=own.samples)
    )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    result = {"options": given, "device": device, "torch": torch.__version__, **made}
    print(json.dumps(brief(result)))
    if own.json:
        with own.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
