"""Draws and losses of the objective as a whole."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.config.sections.objective import ObjectiveConfig
from library.errors import ConfigError
from library.flow.noise import draw_noise
from library.flow.objective import Objective
from library.randomness import Visit

RECORDED = Path(__file__).parents[1] / "data/flow/replay.safetensors"
VISITS = [Visit(f"0/pictures/{name}", 2) for name in "abcd"]
RAW = ObjectiveConfig(timestep_sampling="shift", model_prediction_type="raw")


def _latents(seed: int = 0) -> torch.Tensor:
    return torch.randn(4, 16, 4, 6, generator=torch.Generator().manual_seed(seed))


def test_a_draw_is_the_same_however_the_batch_is_split():
    objective = Objective(replace(RAW, ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True))
    latents = _latents()
    whole = objective.draw(latents, VISITS, seed=5)
    for index in (3, 0):
        alone = objective.draw(latents[index : index + 1], VISITS[index : index + 1], seed=5)
        for name in ("x_t", "t", "noise", "target"):
            assert torch.equal(getattr(alone, name)[0], getattr(whole, name)[index]), name
    assert not torch.equal(objective.draw(latents, VISITS, seed=6).t, whole.t)


def test_input_and_target_lie_on_the_path():
    latents = _latents()
    draw = Objective(RAW).draw(latents, VISITS, seed=5)
    assert torch.equal(draw.noise, draw_noise(5, VISITS, latents.shape[1:]))
    torch.testing.assert_close(draw.x_t, latents + draw.sigmas * draw.target)
    torch.testing.assert_close(draw.x_t + (1 - draw.sigmas) * draw.target, draw.noise)
    assert torch.equal(draw.sigmas.flatten(), draw.t)


@pytest.mark.parametrize("kind", ["raw", "additive", "sigma_scaled"])
def test_the_right_answer_costs_nothing_under_every_prediction_type(kind):
    objective = Objective(replace(RAW, model_prediction_type=kind))
    draw = objective.draw(_latents(), VISITS, seed=5)
    answer = {
        "raw": draw.target,
        "additive": draw.target - draw.x_t,
        "sigma_scaled": (draw.x_t - draw.target) / draw.sigmas,
    }[kind]
    loss = objective.loss(answer, draw)
    assert loss.shape == (4,)
    torch.testing.assert_close(loss, torch.zeros(4), atol=1e-9, rtol=0)
    assert (objective.loss(answer + 1, draw) > 1e-4).all()


def test_input_perturbation_disturbs_the_input_only():
    latents = _latents()
    plain = Objective(RAW).draw(latents, VISITS, seed=5)
    disturbed = Objective(replace(RAW, ip_noise_gamma=0.1)).draw(latents, VISITS, seed=5)
    assert torch.equal(plain.target, disturbed.target)
    further = draw_noise(5, VISITS, latents.shape[1:], purpose="ip_noise")
    torch.testing.assert_close(disturbed.x_t - plain.x_t, 0.1 * plain.sigmas * further, atol=1e-6, rtol=1e-4)
    random = Objective(replace(RAW, ip_noise_gamma=0.1, ip_noise_gamma_random_strength=True))
    strength = (random.draw(latents, VISITS, seed=5).x_t - plain.x_t) / (disturbed.x_t - plain.x_t)
    share = strength.flatten(1).median(dim=1).values
    assert ((share > 0) & (share < 1)).all()
    assert share.unique().numel() == 4


def test_a_fixed_draw_has_the_given_levels_and_ignores_sampling_options():
    latents = _latents()
    options = replace(RAW, ip_noise_gamma=0.5, min_timestep=900)
    draw = Objective(options).draw_fixed(latents, VISITS, seed=5, timesteps=[0, 250, 500, 1000])
    torch.testing.assert_close(draw.t, torch.tensor([0.0, 0.25, 0.5, 1.0]))
    assert torch.equal(draw.x_t[0], latents[0])
    assert torch.equal(draw.x_t[3], draw.noise[3])
    again = Objective(RAW).draw_fixed(latents, VISITS, seed=5, timesteps=[0, 250, 500, 1000])
    assert torch.equal(again.x_t, draw.x_t)


def test_half_precision_latents_are_noised_in_float32():
    draw = Objective(RAW).draw(_latents().bfloat16(), VISITS, seed=5)
    assert {draw.x_t.dtype, draw.t.dtype, draw.target.dtype} == {torch.float32}


def test_a_replaced_target_is_what_counts():
    objective = Objective(RAW)
    draw = objective.draw(_latents(), VISITS, seed=5)
    prior = torch.zeros_like(draw.target)
    torch.testing.assert_close(objective.loss(prior, replace(draw, target=prior)), torch.zeros(4))


@pytest.mark.parametrize("kind", ["huber", "smooth_l1"])
def test_the_snr_schedule_is_refused_where_it_would_be_used(kind):
    with pytest.raises(ConfigError, match=r'huber_schedule = "snr".*constant or exponential'):
        Objective(ObjectiveConfig(loss_type=kind))
    Objective(ObjectiveConfig(loss_type="l2"))


def test_a_recorded_step_of_the_reference_comes_out_bit_for_bit():
    """Latents, noise, time and the model's answer of a run of the reference: same input, target and loss."""
    recorded = load_file(RECORDED)
    objective = Objective(RAW)
    draw = objective.at(recorded["latents"], recorded["noise"], recorded["timesteps"] / 1000)
    assert torch.equal(draw.x_t, recorded["noisy_model_input"])
    assert torch.equal(draw.target, recorded["target"])
    assert torch.equal(draw.t, recorded["sigmas"].flatten())
    torch.testing.assert_close(
        objective.loss(recorded["model_pred"], draw).mean(), recorded["loss"].squeeze()
    )
