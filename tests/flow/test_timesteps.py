"""Noise levels: reference numbers, limits, and closed forms."""

import json
from pathlib import Path

import pytest
import torch

from library.config.sections.objective import ObjectiveConfig
from library.flow.path import num_tokens
from library.flow.timesteps import SAMPLERS, SIGMA_SAMPLERS, sample_sigmas, sampler

VECTORS = json.loads((Path(__file__).parents[1] / "data/flow/vectors.json").read_text())


@pytest.mark.parametrize(
    "case", VECTORS["timesteps"], ids=lambda case: "-".join(map(str, case["args"].values()))
)
def test_equals_the_reference_for_its_random_numbers(case):
    config = ObjectiveConfig(**case["args"])
    torch.manual_seed(case["seed"])
    draw = {"normal": torch.randn, "uniform": torch.rand}[sampler(config).law]
    sigmas = sample_sigmas(draw(case["batch"]), config, tokens=num_tokens(*case["latent_hw"]))
    torch.testing.assert_close(sigmas, torch.tensor(case["sigmas"]), rtol=2e-6, atol=0)
    torch.testing.assert_close(sigmas * 1000, torch.tensor(case["timesteps"]), rtol=2e-6, atol=0)


def _all_samplings():
    return [{"timestep_sampling": name} for name in SAMPLERS] + [
        {"timestep_sampling": "sigma", "weighting_scheme": name} for name in SIGMA_SAMPLERS
    ]


@pytest.mark.parametrize("options", _all_samplings(), ids=lambda options: "-".join(options.values()))
def test_the_whole_distribution_is_squeezed_between_min_and_max_timestep(options):
    free = ObjectiveConfig(**options)
    numbers = {"normal": torch.randn, "uniform": torch.rand}[sampler(free).law](4000)
    everywhere = sample_sigmas(numbers, free, tokens=64)
    assert everywhere.min() < 0.2
    assert everywhere.max() > 0.8
    limited = sample_sigmas(
        numbers, ObjectiveConfig(**options, min_timestep=200, max_timestep=500), tokens=64
    )
    torch.testing.assert_close(limited, 0.2 + 0.3 * everywhere)
    upper = sample_sigmas(numbers, ObjectiveConfig(**options, max_timestep=500), tokens=64)
    torch.testing.assert_close(upper, 0.5 * everywhere)


@pytest.mark.parametrize("number", [2**-25, 1 - 2**-24])
def test_extreme_numbers_stay_above_zero_and_at_most_one(number):
    for options in _all_samplings():
        config = ObjectiveConfig(**options)
        if sampler(config).law == "uniform":
            sigma = sample_sigmas(torch.tensor([number]), config, tokens=64)
            assert 0 < sigma.item() <= 1, options


def test_stays_float32_even_for_half_precision_numbers():
    sigmas = sample_sigmas(torch.rand(4).bfloat16(), ObjectiveConfig(timestep_sampling="uniform"), tokens=64)
    assert sigmas.dtype == torch.float32
