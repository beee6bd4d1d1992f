"""Checkpoints to modules: the four models of FLUX.1 from every layout they come in.

A module is built without memory, then each tensor is read from its file straight to its device and dtype
and put in place, so host memory holds no second copy. Every tensor must be found and every one used, or a
sentence says which. Weights come frozen and modules in eval mode. Saving models is left out: only adapters
are written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from library.errors import CheckpointError
from library.files.safetensors import DTYPES, Reader
from library.models import precision
from library.models.autoencoder import AutoEncoder
from library.models.block_swap import SwapPlan
from library.models.flux import Flux
from library.models.identify import Part, require
from library.models.key_maps import WEIGHT_SCALES, Recipe, is_unused
from library.models.params import AutoEncoderParams, ClipParams, FluxParams, T5Params
from library.models.text_encoders import ClipL, T5Encoder

Model = TypeVar("Model", bound=nn.Module)

_EIGHT_BITS = frozenset(dtype for name, dtype in DTYPES.items() if name.startswith("F8_"))
_DEFAULT_WIDE = torch.bfloat16  # what 8-bit tensors become where 8 bits cannot be kept


@dataclass(frozen=True, slots=True)
class Placement:
    """Where weights go and as what.

    `dtype` None keeps each tensor's stored dtype (8-bit tensors outside the blocks become bfloat16).
    `weight_dtype` float8_e4m3fn stores the weights of the blocks' Linear layers in 8 bits whatever `dtype`
    is. `mmap` maps the files; False reads them with plain file I/O (Kohya's disable_mmap_load_safetensors).
    Linear weights of blocks for which `waits` is true go to main memory instead (blocks_to_swap).
    """

    device: torch.device
    dtype: torch.dtype | None = None
    weight_dtype: torch.dtype | None = None
    mmap: bool = True
    waits: Callable[[str], bool] = field(default=lambda name: False)

    def device_of(self, name: str) -> torch.device:
        """Where the parameter `name` is kept."""
        waits = precision.is_block_weight(name) and self.waits(name)
        return torch.device("cpu") if waits else self.device

    def dtype_of(self, name: str, stored: torch.dtype) -> torch.dtype:
        """The dtype in which the parameter `name` is kept."""
        if precision.is_block_weight(name):
            if self.weight_dtype is not None:
                return self.weight_dtype
            if self.dtype is None and stored == precision.STORAGE:
                return stored
        return self.dtype or (_DEFAULT_WIDE if stored in _EIGHT_BITS else stored)


def load_flux(  # noqa: PLR0913 (each is an option of the trainer)
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    mmap: bool = True,
    blocks_to_swap: int = 0,
    finish: Callable[[nn.Linear], None] | None = None,
    option: str = "pretrained_model_name_or_path",
) -> Flux:
    """The transformer at `path`: a BFL or diffusers file, shards of either, a ComfyUI checkpoint, a
    diffusers folder.

    See `Placement` for the arguments; `option` is the name that errors mention. Blocks that
    `Flux.enable_block_swap(blocks_to_swap)` will let travel stay in main memory. `finish` may store the
    weight of a block's Linear in another way, one layer at a time, while it is on `device`.

    Raises:
        CheckpointError: another kind of file, or tensors missing, unknown or of a wrong shape.
    """
    part = require(path, "flux", option)
    params = cast(FluxParams, part.params())
    plan = SwapPlan.of(params, blocks_to_swap)
    with torch.device("meta"):
        model = Flux(params)
    placement = Placement(
        torch.device(device), dtype, weight_dtype, mmap, waits=lambda name: plan.covers(name, params.depth)
    )
    return _fill(model, part, placement, finish)


def load_autoencoder(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    mmap: bool = True,
    option: str = "ae",
) -> AutoEncoder:
    """The autoencoder at `path`: a BFL or diffusers file, a ComfyUI checkpoint, or a diffusers folder."""
    part = require(path, "ae", option)
    with torch.device("meta"):
        model = AutoEncoder(cast(AutoEncoderParams, part.params()))
    return _fill(model, part, Placement(torch.device(device), dtype, None, mmap))


def load_clip_l(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    mmap: bool = True,
    hidden_act: str | None = None,
    option: str = "clip_l",
) -> ClipL:
    """The CLIP-L text encoder at `path`, in any naming. `hidden_act` "gelu" repeats sd-scripts."""
    part = require(path, "clip_l", option)
    with torch.device("meta"):
        model = ClipL(cast(ClipParams, part.params()), hidden_act=hidden_act)
    model.fill_buffers(torch.device(device))
    return _fill(model, part, Placement(torch.device(device), dtype, None, mmap))


def load_t5(
    path: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weight_dtype: torch.dtype | None = None,
    mmap: bool = True,
    option: str = "t5xxl",
) -> T5Encoder:
    """The T5 encoder at `path`, in any naming; a decoder in the file is not read."""
    part = require(path, "t5xxl", option)
    with torch.device("meta"):
        model = T5Encoder(cast(T5Params, part.params()))
    return _fill(model, part, Placement(torch.device(device), dtype, weight_dtype, mmap))


def _fill(
    model: Model, part: Part, placement: Placement, finish: Callable[[nn.Linear], None] | None = None
) -> Model:
    """Put every tensor of `part` into `model`, which has none yet."""
    recipes = part.recipes()
    parameters = dict(model.named_parameters())
    _check_names(part, recipes, parameters)
    with ExitStack() as stack:
        readers = [stack.enter_context(Reader(header, mmap=placement.mmap)) for header in part.headers]
        for name, empty in parameters.items():
            tensors = [_read(part, readers, source, placement.device) for source in recipes[name].sources]
            tensor = recipes[name].build(tensors, empty.shape)
            if tensor.shape != empty.shape:
                raise CheckpointError(
                    f"{part.headers[0].path} holds {recipes[name].sources[0]} as {tuple(tensor.shape)}, "
                    f"and {tuple(empty.shape)} is needed; the file does not fit together."
                )
            # Cast where that is fast; only then is it put away.
            tensor = precision.cast(tensor, placement.dtype_of(name, tensor.dtype))
            if finish is not None and precision.is_block_weight(name):
                layer = model.get_submodule(name.rpartition(".")[0])
                assert isinstance(layer, nn.Linear), "is_block_weight names Linear layers"
                layer.weight = nn.Parameter(tensor, requires_grad=False)
                finish(layer)
                tensor = layer.weight.detach()
            _assign(model, name, tensor.to(placement.device_of(name)))
    if finish is None and any(parameter.dtype == precision.STORAGE for parameter in model.parameters()):
        precision.store_blocks_in_fp8(model)
    return model.requires_grad_(False).eval()


def _read(part: Part, readers: list[Reader], source: str, device: torch.device) -> Tensor:
    """One stored tensor on `device`, multiplied by its scale if the file has one."""
    index, stored = part.tensors[source]
    tensor = readers[index].read(stored).to(device)
    for suffix in WEIGHT_SCALES:
        scale_name = source.removesuffix(".weight") + suffix
        if source.endswith(".weight") and scale_name in part.tensors:
            index, stored = part.tensors[scale_name]
            scale = readers[index].read(stored).to(device, torch.float32)
            return (tensor.float() * scale).to(_DEFAULT_WIDE)
    return tensor


def _assign(model: nn.Module, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))


def _check_names(part: Part, recipes: Mapping[str, Recipe], needed: Iterable[str]) -> None:
    names = set(needed)
    used = {source for recipe in recipes.values() for source in recipe.sources}
    missing = sorted(
        source
        for name in names
        for source in (recipes[name].sources if name in recipes else (name,))
        if source not in part.tensors
    )
    unknown = sorted(name for name in part.tensors if name not in used and not is_unused(part.kind, name))
    unknown += sorted(name for name in recipes if name not in names)
    for problem, found in (("lacks", missing), ("has an unknown", unknown)):
        if found:
            shown = ", ".join(found[:3]) + (", ..." if len(found) > 3 else "")
            raise CheckpointError(
                f"{part.headers[0].path} {problem} {len(found)} tensor(s) of this model: {shown}."
            )
