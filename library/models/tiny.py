"""The embedded model "polyrank/tiny-flux": a whole FLUX.1 with a transformer of 2.4 million weights, made
on first use.

It needs no download and runs on a CPU in seconds, with the same files, layouts and code paths as the real
one. The autoencoder and the tokenizers work, and the transformer is built to denoise a little; the text encoders
are random, scaled as real ones are at the start of their training. Every weight is a
function of its name, from raw Philox output and exact arithmetic, so the files have the same bytes on every
machine.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from library.files.atomic import write_text
from library.files.safetensors import save_file
from library.files.user_cache import cache_folder
from library.models.flux import Flux
from library.models.params import ClipParams, FluxParams, T5Params, rotary_axes
from library.models.text_encoders import ClipL, T5Encoder
from library.models.tiny_autoencoder import PARAMS as AE_PARAMS
from library.models.tiny_autoencoder import autoencoder_tensors
from library.models.tiny_tokenizers import clip_vocabulary, t5_vocabulary, tokenizer_files
from library.models.tiny_transformer import transformer_tensors
from library.randomness import Visit, generator

NAME = "polyrank/tiny-flux"
FOLDER = "tiny-flux-v2"  # the number changes whenever a byte of the files does

FLUX_PARAMS = FluxParams(
    vec_in_dim=64,
    context_in_dim=64,
    hidden_size=128,
    num_heads=4,
    mlp_hidden=512,
    depth=2,
    depth_single_blocks=4,
    axes_dim=rotary_axes(32),
)
CLIP_PARAMS = ClipParams(
    vocab_size=len(clip_vocabulary()), hidden_size=64, intermediate_size=256, num_layers=2, num_heads=1
)
T5_PARAMS = T5Params(
    vocab_size=len(t5_vocabulary()), d_model=64, d_kv=16, d_ff=128, num_layers=2, num_heads=4
)

Scale = Callable[[str, torch.Size], float]  # name and shape of a weight to its standard deviation


def ensure_tiny_flux() -> Path:
    """The folder with the tiny model's files, made if it is not there."""
    folder = cache_folder() / FOLDER
    write_tiny_flux(folder)
    return folder


def write_tiny_flux(folder: Path) -> None:
    """Write the files of the tiny model that `folder` lacks: flux, ae, clip_l, t5xxl and tokenizers.

    Each file appears whole, and always with the same bytes; so ranks that start at once do not disturb each
    other.
    """
    models: Mapping[str, Callable[[], tuple[dict[str, Tensor], dict[str, str]]]] = {
        "flux.safetensors": lambda: (_bf16(_transformer()), {}),
        "ae.safetensors": lambda: (
            autoencoder_tensors(),
            {"config": json.dumps({"norm_num_groups": AE_PARAMS.num_groups})},
        ),
        "clip_l.safetensors": lambda: (_bf16(_random(ClipL, CLIP_PARAMS, _clip_scale)), {}),
        "t5xxl.safetensors": lambda: (_bf16(_random(T5Encoder, T5_PARAMS, _t5_scale)), {}),
    }
    for name, make in models.items():
        if not (folder / name).is_file():
            save_file(folder / name, *make())
    for name, text in tokenizer_files().items():
        if not (folder / name).is_file():
            write_text(folder / name, text)


def _transformer() -> dict[str, Tensor]:
    return transformer_tensors(FLUX_PARAMS, list(_shapes(Flux, FLUX_PARAMS).items()), _uniform)


def _random(make: Callable[..., nn.Module], params: object, scale: Scale) -> dict[str, Tensor]:
    """Weights of a model: norms one, biases zero, the rest uniform with the deviation that `scale` gives."""
    tensors: dict[str, Tensor] = {}
    for name, shape in _shapes(make, params).items():
        if "norm" in name and not name.endswith("bias"):
            tensors[name] = torch.ones(shape)
        elif name.endswith(".bias"):
            tensors[name] = torch.zeros(shape)
        else:
            tensors[name] = _uniform(name, shape) * scale(name, shape)
    return tensors


def _shapes(make: Callable[..., nn.Module], params: object) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in make(params).named_parameters()}


def _uniform(name: str, shape: torch.Size) -> Tensor:
    """Numbers of mean 0 and variance 1 that depend on `name` only.

    The raw bits of Philox are fixed by its definition; the streams of NumPy's distributions are not.
    """
    raw = generator(0, Visit(f"{NAME}/{name}", 0), "weights").bit_generator.random_raw(shape.numel())
    unit = (raw >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return torch.from_numpy(((unit * 2 - 1) * math.sqrt(3)).astype(np.float32)).reshape(shape)


def _clip_scale(name: str, shape: torch.Size) -> float:
    factors = {"token_embedding": 8.0, "position_embedding": 1.0, "out_proj": 0.5, "fc2": 0.5}
    return next((factor for part, factor in factors.items() if part in name), 1.0) / math.sqrt(shape[-1])


def _t5_scale(name: str, shape: torch.Size) -> float:
    if name == "shared.weight":
        return 1.0
    width = T5_PARAMS.d_model * T5_PARAMS.d_kv if name.endswith(".q.weight") else shape[-1]
    return 1 / math.sqrt(width)


def _bf16(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}
