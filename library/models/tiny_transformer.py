"""Weights of the tiny model's transformer, made by construction: it denoises before any training.

Untrained blocks would drown a short LoRA in their noise. Here the frozen model predicts the best linear
estimate of the velocity for latents that are Gaussian with given variances (of 2x2 patches, and of their
local mean), and the blocks compute random features of content, position, time and text that almost only
other channels of the stream receive. A LoRA can then read out of them what its pictures have in particular.

Channels of the stream, for image tokens:

- 0 to 63: the patch in an orthonormal basis (the 2x2 Haar transform of each latent), averages first.
- 64 and 65: a large constant and its negative, so that layer normalisation divides by a known number.
  Their sign is the other way round for text tokens, which tells the two apart.
- 66 to 68: the local mean of the three colours, by an attention head that looks at its neighbourhood.
- 69 and 70: row and column, by two heads that weigh text (at the origin) against image.
- 71 to 95: velocity of the colours and of the patch means of the details, added to the result as it is. What
  a LoRA writes here counts the same at every time, while the gain of the patch itself changes its sign.
- 96 to 127: random features.

Only arithmetic that IEEE 754 fixes is used, so that the weights have the same bits on every machine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from library.models.params import FluxParams

Uniform = Callable[[str, torch.Size], Tensor]  # numbers of variance 1 that depend on the name only

_PATCH = 64
_REFERENCE = (64, 65)
_MEANS = (66, 67, 68)
_PLACES = (69, 70)
_VELOCITY = 71  # the first of the channels that are added to the result at every time alike
_KEPT = 96  # the channels below are written by design; random features have those above
_LARGE = 64.0  # the constant of the reference channels
_DIVISOR = 8.0  # of layer normalisation: sqrt(2 * 64^2 / 128)
_LEAK = 0.02  # share of the random features that reaches the velocity, so that gradients reach every layer
_REACH = 4.0  # gain of the velocity channels: a LoRA's first small weights already move colours

_HAAR = ((1, 1, 1, 1), (1, -1, 1, -1), (1, 1, -1, -1), (1, -1, -1, 1))  # over (row, column) of a patch, twice
_COLOURS = 3  # the first latents are averages of 8x8 pixels; the others are details of about unit variance

# Standard deviations in that basis: the colours' patch means, their slopes, their diagonals, and every
# detail. The first splits into a local mean and what is left of it. Those of the colours are less than half of
# what pictures have: the frozen model then draws soft greys, and what a LoRA learns shows instead of the seed.
_LOCAL, _REST, _SLOPE, _DIAGONAL, _DETAIL = 1.0, 0.3, 0.3, 0.2, 0.3
_NEIGHBOURS = 7.0  # as many tokens as the local mean effectively averages

# Gains over time are linear between these knots; they bend most near pure noise.
_KNOTS = (*(step / 16 for step in range(16)), 31 / 32)
_SLOWEST = 0.107461  # angle at t = 1 of the slowest sinusoid of the time embedding, whose sine is linear in t
_STEEP = 592.0  # weight that makes the SiLU of a hinge nearly a corner
_SLOWEST_SINE = 255

# Attention: share of a head's scale that tells image from text, and shares of the two fastest rotations of
# each spatial axis. Together they make scores that fall by 1 one token away and by 3 two tokens away.
_SHARPNESS = 3.0  # squared scale of queries and keys
_KIND, _FAST, _SLOW = 0.3, 0.1, 0.25

# Heads that tell the place: how much the text's score falls with the distance from the origin, and the
# image's score, which equals it in the middle of 8x8 tokens.
_PLACE, _MIDDLE = 0.4, 1.3


def transformer_tensors(
    params: FluxParams, shapes: Sequence[tuple[str, torch.Size]], uniform: Uniform
) -> dict[str, Tensor]:
    """All tensors of the tiny transformer, float32, for the names and shapes of its parameters."""
    tensors: dict[str, Tensor] = {}
    for name, shape in shapes:
        if name.endswith("scale"):
            tensors[name] = torch.full(shape, _SHARPNESS).sqrt()
        elif name.endswith("bias"):
            tensors[name] = torch.zeros(shape)
        else:
            tensors[name] = uniform(name, shape) * torch.tensor(1.0 / shape[-1]).sqrt()
    _ends(tensors)
    _time(tensors)
    for name, tensor in tensors.items():
        if name.endswith("lin.weight"):
            _modulation(tensor, tensors[name.replace("weight", "bias")])
        elif name.endswith(("proj.weight", "mlp.2.weight", "linear2.weight")):
            _residual(tensor)
        elif name.endswith(("attn.qkv.weight", "linear1.weight")):
            _local_head(tensor, tensors[name.replace("weight", "bias")], params)
    _first_block(tensors, params)
    return tensors


def _ends(tensors: dict[str, Tensor]) -> None:
    """Patch to stream and back, and text to stream."""
    basis = torch.zeros(_PATCH, _PATCH)
    for kind, signs in enumerate(_HAAR):
        for latent in range(16):
            basis[kind * 16 + latent, latent * 4 : latent * 4 + 4] = torch.tensor(signs) / 2
    for stream, sign in (("img_in", 1.0), ("txt_in", -1.0)):
        weight, bias = tensors[f"{stream}.weight"], tensors[f"{stream}.bias"]
        weight[list(_REFERENCE)] = 0.0
        bias[_REFERENCE[0]], bias[_REFERENCE[1]] = sign * _LARGE, -sign * _LARGE
    tensors["img_in.weight"].zero_()[:_PATCH] = basis
    last = tensors["final_layer.linear.weight"].zero_()
    last[:, :_PATCH] = basis.T * _DIVISOR
    for colour, mean in enumerate(_MEANS):
        last[:, mean] = last[:, colour]
    for channel, target in enumerate(_velocity_targets(), start=_VELOCITY):
        last[:, channel] = basis[target] * _DIVISOR * (_REACH if target % 16 < _COLOURS else 1.0)


def _velocity_targets() -> list[int]:
    """The patch channels that have a velocity channel: all averages, and all of the colours."""
    return [channel for channel in range(_PATCH) if channel < 16 or channel % 16 < _COLOURS]


def _time(tensors: dict[str, Tensor]) -> None:
    """The time embedding computes the gains of the last layer, each with its negative.

    silu(x) - silu(-x) = x, so the last layer's modulation gets them back through its activation.
    """
    count = len(_KNOTS)
    slope = _STEEP * _SLOWEST
    hinges = [_rounded(-slope * knot) for knot in _KNOTS]
    first, second = tensors["time_in.in_layer.weight"], tensors["time_in.out_layer.weight"]
    first[:count] = 0.0
    first[:count, _SLOWEST_SINE] = _STEEP
    tensors["time_in.in_layer.bias"][:count] = torch.tensor(hinges)
    second[:, :count] = 0.0
    modulation = tensors["final_layer.adaLN_modulation.1.weight"].zero_()
    scale = modulation[modulation.shape[0] // 2 :]
    # 1 + scale is the gain: from the time below the velocity channels, 1 from there on.
    half = modulation.shape[0] // 2
    tensors["final_layer.adaLN_modulation.1.bias"][half : half + _VELOCITY] = -1.0
    for number, (gain, channels) in enumerate(_gains()):
        start, steps = _hinge_sum(gain, slope, hinges)
        for row, sign in ((2 * number, 1.0), (2 * number + 1, -1.0)):
            second[row] = 0.0
            second[row, :count] = sign * torch.tensor(steps)
            tensors["time_in.out_layer.bias"][row] = sign * start
            for other in ("vector_in", "guidance_in"):
                tensors[f"{other}.out_layer.weight"][row] = 0.0
            scale[channels, row] = sign


def _gains() -> Iterator[tuple[Callable[[float], float], list[int]]]:
    """Gain over time, and the channels it is for.

    With x of deviation s and noise of variance r, the best linear estimate of noise - x from
    (1 - t) x + t noise is the latter times (t r - (1 - t) s^2) / ((1 - t)^2 s^2 + t^2 r).
    """

    def best(s: float, r: float = 1.0) -> Callable[[float], float]:
        return lambda t: (t * r - (1 - t) * s * s) / ((1 - t) * (1 - t) * s * s + t * t * r)

    rest, mean = best(_REST), best(_LOCAL, 1 / _NEIGHBOURS)
    colours = list(range(_COLOURS))
    yield rest, colours
    yield lambda t: mean(t) - rest(t), list(_MEANS)
    yield best(_SLOPE), [kind * 16 + colour for kind in (1, 2) for colour in colours]
    yield best(_DIAGONAL), [48 + colour for colour in colours]
    yield best(_DETAIL), [channel for channel in range(_PATCH) if channel % 16 >= _COLOURS]


def _hinge_sum(
    gain: Callable[[float], float], slope: float, hinges: Sequence[float]
) -> tuple[float, list[float]]:
    """Value at 0 and the weights of the hinges, such that their sum is `gain` at every knot and at 1.

    Each weight makes up for the rounding of those before it.
    """
    start = _rounded(gain(0.0))
    ends = [*(-hinge / slope for hinge in hinges[1:]), 1.0]
    steps: list[float] = []
    for hinge, end in zip(hinges, ends, strict=True):
        so_far = start + sum(step * (slope * end + at) for step, at in zip(steps, hinges, strict=False))
        steps.append(_rounded((gain(end) - so_far) / (slope * end + hinge)))
    return start, steps


def _modulation(weight: Tensor, bias: Tensor) -> None:
    """Undo the division of layer normalisation, let every branch take part, and vary random features only."""
    parts, biases = weight.view(-1, 3, 128, 128), bias.view(-1, 3, 128)
    parts *= 0.5
    parts[:, :, :_KEPT] = 0.0
    biases[:, 1] = _DIVISOR - 1
    biases[:, 1, list(_REFERENCE)] = _DIVISOR / _LARGE - 1  # they count as +1 and -1
    biases[:, 2] = 1.0


def _residual(weight: Tensor) -> None:
    """Random features go to the channels that are theirs."""
    weight[:_VELOCITY] = 0.0
    weight[_VELOCITY:_KEPT] *= _LEAK


def _local_head(weight: Tensor, bias: Tensor, params: FluxParams) -> None:
    """The first head looks at image tokens nearby, whatever they hold."""
    width = params.hidden_size // params.num_heads
    near = _near(params)
    for part in (0, params.hidden_size):
        weight[part : part + width] = 0.0
        bias[part : part + width] = near
    # A query looks for +1, an image token; a key says what it is.
    bias[params.hidden_size] = 0.0
    weight[params.hidden_size, _REFERENCE[0]] = near[0]


def _near(params: FluxParams) -> Tensor:
    """Query and key whose score falls with the distance of their tokens."""
    time, row, _ = params.axes_dim
    pattern = torch.zeros(params.hidden_size // params.num_heads)
    pattern[0] = _KIND
    for axis in (time, time + row):
        pattern[axis], pattern[axis + 2] = _FAST, _SLOW
    return pattern.sqrt()


def _first_block(tensors: dict[str, Tensor], params: FluxParams) -> None:
    """Local means and places: what the first heads of the first block carry."""
    width, hidden = params.hidden_size // params.num_heads, params.hidden_size
    image, text = "double_blocks.0.img_attn", "double_blocks.0.txt_attn"
    project = tensors[f"{image}.proj.weight"]
    for colour, mean in enumerate(_MEANS):
        value = 2 * hidden + colour
        tensors[f"{image}.qkv.weight"][value] = 0.0
        tensors[f"{text}.qkv.weight"][value] = 0.0
        tensors[f"{image}.qkv.weight"][value, colour] = 1.0
        project[:, colour] = 0.0
        project[mean, colour] = 1.0
    axes = (params.axes_dim[0], params.axes_dim[0] + params.axes_dim[1])
    for head, (axis, place) in enumerate(zip(axes, _PLACES, strict=True), start=1):
        query, key, value = (part * hidden + head * width for part in range(3))
        looks, is_text = torch.zeros(width), torch.zeros(width)
        looks[0], looks[axis + 2] = 1.0, _PLACE
        is_text[0], is_text[axis + 2] = 1.0, 1.0
        # As long as the text's key, since both are normalised; what makes it so meets a zero in the query.
        is_image = torch.zeros(width)
        is_image[0], is_image[2] = _MIDDLE, (2 - _MIDDLE * _MIDDLE) ** 0.5
        for stream, part, direction in (
            (image, query, looks),
            (text, query, looks),
            (image, key, is_image),
            (text, key, is_text),
        ):
            tensors[f"{stream}.qkv.weight"][part : part + width] = 0.0
            tensors[f"{stream}.qkv.bias"][part : part + width] = direction
        for stream in (image, text):
            tensors[f"{stream}.qkv.weight"][value] = 0.0
        tensors[f"{text}.qkv.bias"][value] = 1.0
        project[:, head * width] = 0.0
        project[place, head * width] = 4.0
        tensors[f"{image}.proj.bias"][place] = -2.0


def _rounded(value: float) -> float:
    """To what bfloat16 holds, as the file will."""
    return float(torch.tensor(value, dtype=torch.float64).to(torch.bfloat16))
