"""Weights of the tiny model's autoencoder, made by construction: it reconstructs pictures, blurred,
untrained.

The encoder is a three-level Haar transform of luma and two colour differences; its 16 latents are the
averages of 8x8 pixels and 13 details, the averages scaled to a deviation of about 1.5 on
pictures and the details to 0.3, so that the colours, which one sees first, weigh most in a loss. The decoder
interpolates the averages and sharpens with the details: 24 dB on photographs. Residual branches and
attention are zero. Two tricks make a linear map of layers that normalise and bend:

- A group that holds x, -x, K and -K has mean 0 and, K being large, a deviation that hardly depends on x, so
  group
  normalisation is a multiplication by a known constant.
- silu(x) - silu(-x) = x exactly, so a convolution that takes the difference undoes the activation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from library.models.autoencoder import AutoEncoder
from library.models.params import AutoEncoderParams

PARAMS = AutoEncoderParams(ch=16, ch_mult=(1, 2, 4, 4), num_res_blocks=1, num_groups=4)

_LARGE = 32.0  # K above; signals are about -1..1
_LOG_VARIANCE = -8.0  # of the posterior: a deviation of 0.018, against 2.8 of the means

# Luma and two differences of (red, green, blue); the rows are orthogonal.
_COLOURS = ((1 / 3, 1 / 3, 1 / 3), (1 / 2, 0.0, -1 / 2), (-1 / 4, 1 / 2, -1 / 4))
_COLOURS_BACK = ((1.0, 1.0, -2 / 3), (1.0, 0.0, 4 / 3), (1.0, -1.0, -2 / 3))  # the inverse
_HAAR: Mapping[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "average": ((0.25, 0.25), (0.25, 0.25)),
    "column": ((0.25, -0.25), (0.25, -0.25)),
    "row": ((0.25, 0.25), (-0.25, -0.25)),
    "diagonal": ((0.25, -0.25), (-0.25, 0.25)),
}

# The second halving: output channel, filter, input channel. Channels 0 to 2 are the colours' averages.
_SECOND = (
    *((channel, "average", channel) for channel in range(3)),
    (3, "column", 0),
    (4, "row", 0),
    (5, "diagonal", 0),
    (6, "column", 1),
)
# The latents: filter of the third halving, its input channel, what a latent of 1 stands for.
_LATENTS = (
    ("average", 0, 0.32),
    ("average", 1, 0.16),
    ("average", 2, 0.075),
    ("column", 0, 0.3),
    ("row", 0, 0.3),
    ("diagonal", 0, 0.14),
    ("column", 1, 0.15),
    ("row", 1, 0.17),
    ("diagonal", 1, 0.08),
    ("column", 2, 0.066),
    ("row", 2, 0.072),
    ("diagonal", 2, 0.033),
    ("average", 3, 0.13),
    ("average", 4, 0.12),
    ("average", 5, 0.042),
    ("average", 6, 0.066),
)
_DECODED = 12  # of the latents, that the decoder uses

# After nearest-neighbour doubling, a smooth kernel interpolates averages linearly. An antisymmetric one
# adds the difference of neighbouring details, what linear interpolation misses; 0.8 gave the best error on
# photographs.
_SMOOTH = torch.tensor((0.25, 0.5, 0.25))
_EDGE = torch.tensor((-0.8, 0.0, 0.8))


def autoencoder_tensors() -> dict[str, Tensor]:
    """All tensors of the tiny autoencoder, float32, under their checkpoint names."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in AutoEncoder(PARAMS).state_dict().items()}
    tensors = {
        name: torch.ones(shape) if ".norm" in name and name.endswith("weight") else torch.zeros(shape)
        for name, shape in shapes.items()
    }
    for name, tensor in tensors.items():
        if "nin_shortcut.weight" in name:
            _set_identity(tensor)
    _encoder(tensors)
    _decoder(tensors)
    return tensors


def _encoder(tensors: dict[str, Tensor]) -> None:
    tensors["encoder.conv_in.weight"][:3, :, 1, 1] = torch.tensor(_COLOURS)
    for channel in range(3):
        _set_haar(tensors["encoder.down.0.downsample.conv.weight"], channel, "average", channel)
    for target, kind, source in _SECOND:
        _set_haar(tensors["encoder.down.1.downsample.conv.weight"], target, kind, source)
    third = tensors["encoder.down.2.downsample.conv.weight"]
    group = third.shape[0] // PARAMS.num_groups
    out = tensors["encoder.conv_out.weight"]
    for number, (kind, source, deviation) in enumerate(_LATENTS):
        positive = number // 4 * group + number % 4 * 2
        _set_haar(third, positive, kind, source)
        third[positive + 1] = -third[positive]
        gain = 1 / (PARAMS.scale_factor * deviation)
        out[number, positive, 1, 1], out[number, positive + 1, 1, 1] = gain, -gain
    bias = tensors["encoder.down.2.downsample.conv.bias"].view(PARAMS.num_groups, group)
    bias[:, 8], bias[:, 9] = _LARGE, -_LARGE
    tensors["encoder.norm_out.weight"].fill_(_LARGE * math.sqrt(2 / group))
    tensors["encoder.conv_out.bias"][: PARAMS.z_channels] = PARAMS.shift_factor
    tensors["encoder.conv_out.bias"][PARAMS.z_channels :] = _LOG_VARIANCE


def _decoder(tensors: dict[str, Tensor]) -> None:
    for latent in range(_DECODED):
        gain = PARAMS.scale_factor * _LATENTS[latent][2]
        tensors["decoder.conv_in.weight"][latent, latent, 1, 1] = gain
        tensors["decoder.conv_in.bias"][latent] = -gain * PARAMS.shift_factor
    for level in (1, 2, 3):
        for channel in range(3):
            tensors[f"decoder.up.{level}.upsample.conv.weight"][channel, channel] = _SMOOTH.outer(_SMOOTH)
    first = tensors["decoder.up.3.upsample.conv.weight"]
    for latent in range(3, _DECODED):
        kind, channel, _ = _LATENTS[latent]
        if kind in ("column", "row"):
            kernel = _SMOOTH.outer(_EDGE)
            first[channel, latent] = kernel if kind == "column" else kernel.T
    last = tensors["decoder.up.0.block.0.nin_shortcut.weight"].zero_()
    group = last.shape[0] // PARAMS.num_groups
    bias = tensors["decoder.up.0.block.0.nin_shortcut.bias"].view(PARAMS.num_groups, group)
    bias[:, 2], bias[:, 3] = _LARGE, -_LARGE
    tensors["decoder.norm_out.weight"].fill_(_LARGE * math.sqrt(2 / group))
    back = torch.tensor(_COLOURS_BACK)
    for channel in range(3):
        positive = channel * group
        last[positive, channel], last[positive + 1, channel] = 1.0, -1.0
        tensors["decoder.conv_out.weight"][:, positive, 1, 1] = back[:, channel]
        tensors["decoder.conv_out.weight"][:, positive + 1, 1, 1] = -back[:, channel]


def _set_haar(weight: Tensor, target: int, kind: str, source: int) -> None:
    weight[target, source, :2, :2] = torch.tensor(_HAAR[kind])


def _set_identity(weight: Tensor) -> None:
    for channel in range(min(weight.shape[:2])):
        weight[channel, channel] = 1.0
