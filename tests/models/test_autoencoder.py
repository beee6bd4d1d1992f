"""The autoencoder against diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import AutoencoderKL
from model_examples import TINY_AE, difference, random_autoencoder

from library.models.autoencoder import AutoEncoder
from library.models.key_maps import autoencoder_to_diffusers
from library.models.params import AutoEncoderParams


@pytest.fixture(scope="module")
def pair():
    ours = random_autoencoder()
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=[TINY_AE.ch * m for m in TINY_AE.ch_mult],
        layers_per_block=TINY_AE.num_res_blocks,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )
    theirs.load_state_dict(autoencoder_to_diffusers(ours.state_dict(), TINY_AE), strict=True)
    return ours, theirs.eval()


@torch.no_grad()
def test_encode_equals_diffusers(pair):
    ours, theirs = pair
    images = torch.rand(2, 3, 40, 24) * 2 - 1
    noise = torch.randn(2, 16, 10, 6)
    posterior = theirs.encode(images).latent_dist
    assert difference(ours.encode(images), 0.3611 * (posterior.mean - 0.1159)) < 1e-5
    drawn = posterior.mean + posterior.std * noise
    assert difference(ours.encode(images, noise), 0.3611 * (drawn - 0.1159)) < 1e-5


@torch.no_grad()
def test_decode_equals_diffusers(pair):
    ours, theirs = pair
    latents = torch.randn(2, 16, 10, 6)
    assert difference(ours.decode(latents), theirs.decode(latents / 0.3611 + 0.1159).sample) < 1e-5


def test_full_size_has_the_published_tensors():
    with torch.device("meta"):
        model = AutoEncoder(AutoEncoderParams())
    state = model.state_dict()
    assert len(state) == 244
    assert state["encoder.conv_out.weight"].shape == (32, 512, 3, 3)
    assert state["decoder.up.0.block.0.nin_shortcut.weight"].shape == (128, 256, 1, 1)
    assert (
        AutoEncoderParams.from_shapes({k: tuple(v.shape) for k, v in state.items()}, {})
        == AutoEncoderParams()
    )
