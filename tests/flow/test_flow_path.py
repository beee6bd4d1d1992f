"""Packing, positions and the path, against reference numbers and closed forms."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import FluxPipeline

from library.flow.path import PREDICTION_TYPES, image_ids, interpolate, num_tokens, pack, unpack, velocity

VECTORS = json.loads((Path(__file__).parents[1] / "data/flow/vectors.json").read_text())


def test_pack_equals_the_reference():
    packed = pack(torch.arange(32.0).reshape(1, 2, 4, 4))
    assert packed.tolist() == VECTORS["pack_latents_of_arange_1x2x4x4"]


def test_pack_and_ids_equal_diffusers():
    latents = torch.randn(2, 16, 6, 10)
    assert torch.equal(pack(latents), FluxPipeline._pack_latents(latents, 2, 16, 6, 10))
    ids = FluxPipeline._prepare_latent_image_ids(2, 3, 5, "cpu", torch.float32)
    assert torch.equal(image_ids(2, height=6, width=10), ids.expand(2, -1, -1))


def test_unpack_undoes_pack_for_any_shape():
    latents = torch.randn(2, 16, 6, 10)
    assert pack(latents).shape == (2, num_tokens(6, 10), 64)
    assert torch.equal(unpack(pack(latents), height=6, width=10), latents)


def test_ids_equal_the_reference():
    ids = image_ids(1, height=4, width=6)
    assert ids.tolist() == [VECTORS["img_ids_2x3"]]
    assert ids.dtype == torch.float32


def test_the_path_ends_at_the_picture_and_at_noise_and_has_constant_velocity():
    latents, noise = torch.randn(2, 16, 4, 4), torch.randn(2, 16, 4, 4)
    ends = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    assert torch.equal(interpolate(latents, noise, ends)[0], latents[0])
    assert torch.equal(interpolate(latents, noise, ends)[1], noise[1])
    here = torch.full((2, 1, 1, 1), 0.3)
    moved = interpolate(latents, noise, here) + 0.5 * velocity(latents, noise)
    torch.testing.assert_close(moved, interpolate(latents, noise, here + 0.5))


@pytest.mark.parametrize(("name", "expected"), [("raw", 2.0), ("additive", 5.0), ("sigma_scaled", 2.5)])
def test_prediction_types(name, expected):
    prediction, x_t, sigmas = (
        torch.full((1, 1, 1, 1), 2.0),
        torch.full((1, 1, 1, 1), 3.0),
        torch.full((1,), 0.25),
    )
    assert PREDICTION_TYPES[name](prediction, x_t, sigmas.reshape(1, 1, 1, 1)).item() == expected
