"""Every combination of the objective's options against Kohya's formulas, written a second time in NumPy."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from library.adapters.base import Conditions
from library.adapters.flux import FluxTrainModule, ForwardSettings
from library.config.sections.objective import ObjectiveConfig
from library.data.records import TextCond
from library.flow.noise import draw_noise, draw_normal, draw_uniform
from library.flow.objective import Objective
from library.flow.timesteps import NUM_TIMESTEPS
from library.models.flux import Flux
from library.models.tiny import FLUX_PARAMS
from library.randomness import Visit

VECTORS = json.loads((Path(__file__).parents[1] / "data/flow/vectors.json").read_text())
SEED, SIZE = 3, (16, 8, 12)
VISITS = [Visit(f"0/pictures/{name}.png", 1) for name in "abcdef"]
SAMPLINGS = ("sigma", "uniform", "sigmoid", "shift", "flux_shift")
SCHEMES = ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform")
PREDICTIONS = ("raw", "additive", "sigma_scaled")
LOSSES = (
    ("l2", "snr"),
    ("l1", "snr"),
    *itertools.product(("huber", "smooth_l1"), ("constant", "exponential")),
)
SHIFT, SIGMOID, MEAN, STD, MODE, HUBER_C, HUBER_SCALE = 3.1582, 1.3, 0.2, 1.1, 1.29, 0.15, 1.5


def sigmas(sampling: str, scheme: str) -> np.ndarray:  # [B]
    """Spec, "Training step", 2, from our own random numbers."""
    normal = draw_normal(SEED, VISITS, purpose="timestep").numpy().astype(np.float64)
    uniform = draw_uniform(SEED, VISITS, purpose="timestep").numpy().astype(np.float64)
    if sampling == "uniform":
        return uniform
    if sampling == "sigma":
        if scheme == "logit_normal":
            u = 1 / (1 + np.exp(-(MEAN + STD * normal)))
        elif scheme == "mode":
            u = 1 - uniform - MODE * (np.cos(np.pi * uniform / 2) ** 2 - 1 + uniform)
        else:
            u = uniform
        base = (NUM_TIMESTEPS - np.floor(u * NUM_TIMESTEPS)) / NUM_TIMESTEPS
        return SHIFT * base / (1 + (SHIFT - 1) * base)
    s = 1 / (1 + np.exp(-SIGMOID * normal))
    if sampling == "shift":
        return s * SHIFT / (1 + (SHIFT - 1) * s)
    if sampling == "flux_shift":
        mu = 0.5 + (1.15 - 0.5) / (4096 - 256) * ((SIZE[1] // 2) * (SIZE[2] // 2) - 256)
        return np.exp(mu) / (np.exp(mu) + (1 / s - 1))
    return s


def expected_loss(
    s: np.ndarray, x: np.ndarray, noise: np.ndarray, output: np.ndarray, *,
    scheme: str, prediction: str, loss: str, schedule: str, mask: np.ndarray | None,
) -> np.ndarray:  # [B]  # fmt: skip
    """Spec, "Training step", 3 to 9 and "Loss"."""
    s = s.reshape(-1, 1, 1, 1)
    x_t = (1 - s) * x + s * noise
    estimate = {"raw": output, "additive": output + x_t, "sigma_scaled": output * -s + x_t}[prediction]
    difference = estimate - (noise - x)
    c = np.full_like(s, HUBER_C) if schedule == "constant" else np.exp(np.log(HUBER_C) / 1000 * 1000 * s)
    root = np.sqrt(difference**2 + (c * HUBER_SCALE) ** 2) - c * HUBER_SCALE
    value = {
        "l2": difference**2, "l1": np.abs(difference), "huber": 2 * c * HUBER_SCALE * root, "smooth_l1": 2 * root,
    }[loss]  # fmt: skip
    if prediction == "sigma_scaled":
        if scheme == "sigma_sqrt":
            value = value * s**-2.0
        elif scheme == "cosmap":
            value = value * 2 / (np.pi * (1 - 2 * s + 2 * s**2))
    if mask is not None:
        height, width = SIZE[1:]
        cells = mask.reshape(len(mask), 1, height, 8, width, 8).mean(axis=(3, 5))
        value = value * cells
    return value.mean(axis=(1, 2, 3))


@pytest.mark.parametrize("sampling", SAMPLINGS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_all_combinations_are_the_formulas(sampling: str, scheme: str):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(len(VISITS), *SIZE, generator=generator)
    output = torch.randn(latents.shape, generator=generator)
    mask = torch.rand(len(VISITS), 1, SIZE[1] * 8, SIZE[2] * 8, generator=generator)
    noise = draw_noise(SEED, VISITS, SIZE).numpy().astype(np.float64)
    wanted = sigmas(sampling, scheme)
    for prediction, (loss, schedule) in itertools.product(PREDICTIONS, LOSSES):
        objective = Objective(
            ObjectiveConfig(
                timestep_sampling=sampling,
                weighting_scheme=scheme,
                model_prediction_type=prediction,
                loss_type=loss,
                huber_schedule=schedule,
                huber_c=HUBER_C,
                huber_scale=HUBER_SCALE,
                discrete_flow_shift=SHIFT,
                sigmoid_scale=SIGMOID,
                logit_mean=MEAN,
                logit_std=STD,
                mode_scale=MODE,
            )
        )
        draw = objective.draw(latents, VISITS, seed=SEED)
        np.testing.assert_allclose(draw.t.numpy(), wanted, rtol=2e-6)
        for given in (None, mask):
            numbers = objective.loss(output, draw, given).numpy()
            # The noise level is compared above; from it on, the very one that was drawn.
            expected = expected_loss(
                draw.t.numpy().astype(np.float64), latents.numpy().astype(np.float64), noise,
                output.numpy().astype(np.float64), scheme=scheme, prediction=prediction, loss=loss,
                schedule=schedule, mask=None if given is None else given.numpy().astype(np.float64),
            )  # fmt: skip
            np.testing.assert_allclose(
                numbers, expected, rtol=2e-5, err_msg=f"{prediction} {loss} {schedule}"
            )


@pytest.mark.parametrize(("given", "rounded"), VECTORS["bf16_timestep_rounding"])
def test_bf16_training_keeps_the_timestep_that_the_reference_rounds(given: float, rounded: float):
    """Half precision holds no timestep finely; the transformer gets the very one that the input was mixed with."""
    assert torch.tensor(given).bfloat16().item() == rounded
    transformer = Flux(FLUX_PARAMS).bfloat16().requires_grad_(False)
    seen: list[torch.Tensor] = []
    transformer.register_forward_pre_hook(
        lambda _, __, named: seen.append(named["timesteps"]), with_kwargs=True
    )
    root = FluxTrainModule(
        transformer=transformer, network=torch.nn.Module(), clip_l=None, t5=None,
        settings=ForwardSettings(guidance_scale=1.0, apply_t5_attn_mask=False, autocast_dtype=torch.bfloat16),
    )  # fmt: skip
    text = TextCond(torch.zeros(1, 64), torch.zeros(1, 2, 64), torch.ones(1, 2))
    objective = Objective(ObjectiveConfig(model_prediction_type="raw"))
    latents = torch.zeros(1, 16, 2, 2).bfloat16()
    draw = objective.at(latents, torch.zeros(1, 16, 2, 2), torch.tensor([given / NUM_TIMESTEPS]))
    root(draw.x_t, draw.t, Conditions(text=text, tokens=None))
    assert seen[0].dtype == torch.float32
    assert seen[0].item() * NUM_TIMESTEPS == pytest.approx(given, rel=1e-6)
