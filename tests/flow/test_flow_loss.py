"""Losses, weightings and masks against reference numbers and closed forms."""

import json
import math
from pathlib import Path

import pytest
import torch

from library.config.sections.objective import ObjectiveConfig
from library.flow.loss import loss_per_sample, threshold, weighting

VECTORS = json.loads((Path(__file__).parents[1] / "data/flow/vectors.json").read_text())
DISTANCES = VECTORS["losses_pred_[0.5,-1]_target_[0,2]_huber_c_0.1"]


@pytest.mark.parametrize("name", DISTANCES)
def test_distances_equal_the_reference(name):
    config = ObjectiveConfig(loss_type=name, huber_schedule="constant", model_prediction_type="raw")
    estimate = torch.tensor([0.5, -1.0]).reshape(2, 1, 1, 1)
    target = torch.tensor([0.0, 2.0]).reshape(2, 1, 1, 1)
    loss = loss_per_sample(estimate, target, sigmas=torch.full((2, 1, 1, 1), 0.5), config=config)
    torch.testing.assert_close(loss, torch.tensor(DISTANCES[name]), rtol=1e-5, atol=0)


def test_huber_threshold_follows_its_schedule_as_in_the_reference():
    config = ObjectiveConfig(loss_type="huber", huber_schedule="exponential", huber_scale=2.0)
    expected = VECTORS["huber_exponential_c_at_t"]
    sigmas = torch.tensor([float(t) / 1000 for t in expected]).reshape(-1, 1, 1, 1)
    values = threshold(sigmas, config).flatten() / 2.0
    torch.testing.assert_close(values, torch.tensor(list(expected.values())), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scheme", VECTORS["loss_weighting_sigma_0.25"])
def test_weightings_equal_the_reference_and_act_only_on_sigma_scaled_predictions(scheme):
    estimate, target = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2)
    sigmas = torch.full((3, 1, 1, 1), 0.25)
    plain = ObjectiveConfig(weighting_scheme=scheme, model_prediction_type="raw")
    weighted = ObjectiveConfig(weighting_scheme=scheme, model_prediction_type="sigma_scaled")
    mean = (estimate - target).square().mean(dim=(1, 2, 3))
    torch.testing.assert_close(loss_per_sample(estimate, target, sigmas=sigmas, config=plain), mean)
    assert weighting(sigmas, plain) is None
    factor = VECTORS["loss_weighting_sigma_0.25"][scheme]
    torch.testing.assert_close(
        loss_per_sample(estimate, target, sigmas=sigmas, config=weighted), factor * mean
    )


def test_huber_is_quadratic_near_zero_and_linear_far_away():
    config = ObjectiveConfig(loss_type="huber", huber_schedule="constant", model_prediction_type="raw")
    differences = torch.tensor([1e-3, 100.0]).reshape(2, 1, 1, 1)
    loss = loss_per_sample(differences, torch.zeros_like(differences), sigmas=differences, config=config)
    assert math.isclose(loss[0].item(), 1e-6, rel_tol=1e-2)
    assert math.isclose(loss[1].item(), 2 * 0.1 * (100 - 0.1), rel_tol=1e-4)


def test_a_mask_weighs_cells_by_the_mean_of_their_pixels_and_the_mean_is_over_all():
    config = ObjectiveConfig(model_prediction_type="raw")
    mask = torch.zeros(2, 1, 16, 16)
    mask[0, :, :8, :] = 1  # the upper row of cells
    mask[1, :, :8, :4] = 1  # half of the first cell
    ones = torch.ones(2, 16, 2, 2)
    loss = loss_per_sample(
        ones, torch.zeros_like(ones), sigmas=torch.ones(2, 1, 1, 1), config=config, mask=mask
    )
    torch.testing.assert_close(loss, torch.tensor([0.5, 0.125]))


def test_half_precision_predictions_are_judged_in_float32():
    config = ObjectiveConfig(model_prediction_type="raw")
    estimate = torch.full((1, 1, 1, 1), 256.0, dtype=torch.float16)
    loss = loss_per_sample(estimate, torch.zeros(1, 1, 1, 1), sigmas=torch.ones(1, 1, 1, 1), config=config)
    assert loss.dtype == torch.float32
    assert loss.item() == 65536.0  # overflows float16
