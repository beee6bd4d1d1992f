"""Models of random weights, made where they are wanted: they cost the time that real ones do."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from library.adapters.text import FluxTextEncoders
from library.cache.text import OutputSize, TextOptions
from library.files.atomic import replacing
from library.models import tiny
from library.models.autoencoder import AutoEncoder
from library.models.flux import Flux
from library.models.locate import locate
from library.models.params import AutoEncoderParams, ClipParams, FluxParams, T5Params
from library.models.text_encoders import ClipL, T5Encoder
from library.models.tokenizers import FluxTokenizers
from library.train.loading import ModelLoader

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class ModelSizes:
    """Sizes of all four models."""

    flux: FluxParams = field(default_factory=FluxParams)
    autoencoder: AutoEncoderParams = field(default_factory=AutoEncoderParams)
    clip_l: ClipParams = field(default_factory=ClipParams)
    t5: T5Params = field(default_factory=T5Params)


MODEL_SIZES = {
    "dev": ModelSizes(),
    "tiny": ModelSizes(tiny.FLUX_PARAMS, tiny.AE_PARAMS, tiny.CLIP_PARAMS, tiny.T5_PARAMS),
}


@torch.no_grad()
def random_model(make: Callable[[], Model], *, device: torch.device, dtype: torch.dtype) -> Model:
    """A frozen model: norms one, biases zero, other weights normal, so that a layer keeps its input's size."""
    with torch.device("meta"):
        model = make()
    generator = torch.Generator(device=device).manual_seed(0)
    made: dict[nn.Parameter, nn.Parameter] = {}  # T5 has one table under two names
    for module in model.modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            if empty not in made:
                made[empty] = nn.Parameter(
                    _values(type(module).__name__, name, empty, generator, dtype), requires_grad=False
                )
            setattr(module, name, made[empty])
    return model.eval()


def _values(
    owner: str, name: str, empty: torch.Tensor, generator: torch.Generator, dtype: torch.dtype
) -> torch.Tensor:
    device = generator.device
    if name == "bias":
        return torch.zeros(empty.shape, dtype=dtype, device=device)
    if "Norm" in owner or name == "scale":
        return torch.ones(empty.shape, dtype=dtype, device=device)
    deviation = 1.0 if owner == "Embedding" else 1 / math.sqrt(empty[0].numel())
    return torch.randn(empty.shape, generator=generator, device=device).mul_(deviation).to(dtype)


@dataclass(frozen=True)
class RandomEncoders(ModelLoader):
    """Has encoders of random weights ready where a run reads them from files; tokenizers are the tiny model's."""

    sizes: ModelSizes = field(default_factory=ModelSizes)
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def autoencoder(self) -> AutoEncoder:
        """On `device` at once."""
        return random_model(
            lambda: AutoEncoder(self.sizes.autoencoder), device=self.device, dtype=self.autoencoder_dtype
        )

    def text_encoders(self, device: torch.device) -> FluxTextEncoders:
        """Both, on `device`."""
        clip_l = random_model(lambda: ClipL(self.sizes.clip_l), device=device, dtype=self.dtype)
        clip_l.fill_buffers(device)
        return FluxTextEncoders(
            clip_l=clip_l,
            t5=random_model(lambda: T5Encoder(self.sizes.t5), device=device, dtype=self.dtype),
            tokenizers=FluxTokenizers.load(
                locate(tiny.NAME, "tokenizers", "tokenizer_cache_dir"), t5_length=self.t5_length
            ),
            apply_t5_attn_mask=self.config.model.apply_t5_attn_mask,
            autocast_dtype=self.autocast_dtype,
        )

    @property
    def t5_length(self) -> int:
        """Tokens a caption is padded to."""
        return self.config.model.t5xxl_max_token_length or 512

    def autoencoder_identity(self) -> str:
        """One name for all random weights."""
        return "random"

    def text_options(self) -> TextOptions:
        """As of a run, with one name for all random weights."""
        return TextOptions("random", self.t5_length, self.config.model.apply_t5_attn_mask)

    def text_size(self) -> OutputSize:
        """How large the text encoders' outputs are."""
        sizes = self.sizes
        return OutputSize(sizes.clip_l.hidden_size, sizes.t5.d_model, self.t5_length, self.dtype.itemsize)


def write_random_flux(path: Path, params: FluxParams, *, device: torch.device) -> None:
    """A transformer of random bfloat16 weights as a safetensors file, one tensor at a time. Raises OSError."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Flux(params).state_dict().items()}
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * shape.numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    generator = torch.Generator(device=device).manual_seed(0)
    drawn = torch.randn(1 << 20, generator=generator, device=device).mul_(0.02).bfloat16()
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for name, shape in shapes.items():
            if name.endswith("scale"):
                values = torch.ones(shape.numel(), dtype=torch.bfloat16)
            else:
                values = drawn.repeat(-(-shape.numel() // drawn.numel()))[: shape.numel()].cpu()
            values.view(torch.uint8).numpy().tofile(file)
