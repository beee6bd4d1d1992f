"""Checkpoints to modules: the four models of FLUX.1 from every layout they come in.

A module is built without memory, then each tensor is read from its file straight to its device, cast there,
and put in place, so host memory holds no second copy. Every tensor must be found and every one used, or a
sentence says which. Weights come frozen and modules in eval mode. Saving models is left out: only adapters
are written.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from library.errors import CheckpointError
from library.files.read_ahead import read_ahead
from library.files.safetensors import DTYPES, Header, Reader
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
    is. `mmap` maps the files; False reads them with plain file I/O (Kohya's disable_mmap_load_safetensors), which
    is what a GPU's weights come by in any case.
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
    finish: Callable[[str, nn.Linear], None] | None = None,
    option: str = "pretrained_model_name_or_path",
) -> Flux:
    """The transformer at `path`: a BFL or diffusers file, shards of either, a ComfyUI checkpoint, a
    diffusers folder.

    See `Placement` for the arguments; `option` is the name that errors mention. Blocks that
    `Flux.enable_block_swap(blocks_to_swap)` will let travel stay in main memory. `finish` may store the
    weight of a block's Linear, whose name it gets, in another way, one layer at a time, while it is on `device`.

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
    model: Model, part: Part, placement: Placement, finish: Callable[[str, nn.Linear], None] | None = None
) -> Model:
    """Put every tensor of `part` into `model`, which has none yet."""
    recipes = part.recipes()
    parameters = dict(model.named_parameters())
    _check_names(part, recipes, parameters)
    # As they lie in the files, which disks read fastest.
    names = sorted(parameters, key=lambda name: _offset(part, recipes[name].sources[0]))
    wanted = [place for name in names for source in recipes[name].sources for place in _places(part, source)]
    with closing(_stored(wanted, placement)) as stored:
        for name in names:
            tensors = [_read(part, source, stored) for source in recipes[name].sources]
            shape = parameters[name].shape
            tensor = recipes[name].build(tensors, shape)
            if tensor.shape != shape:
                raise CheckpointError(
                    f"{part.headers[0].path} holds {recipes[name].sources[0]} as {tuple(tensor.shape)}, "
                    f"and {tuple(shape)} is needed; the file does not fit together."
                )
            # Cast where that is fast; only then is it put away.
            tensor = precision.cast(tensor, placement.dtype_of(name, tensor.dtype))
            if finish is not None and precision.is_block_weight(name):
                layer = model.get_submodule(name.rpartition(".")[0])
                assert isinstance(layer, nn.Linear), "is_block_weight names Linear layers"
                layer.weight = nn.Parameter(tensor, requires_grad=False)
                finish(name, layer)
                tensor = layer.weight.detach()
            _assign(model, name, tensor.to(placement.device_of(name)))
    if finish is None and any(parameter.dtype == precision.STORAGE for parameter in model.parameters()):
        precision.store_blocks_in_fp8(model)
    return model.requires_grad_(False).eval()


def _offset(part: Part, source: str) -> tuple[int, int]:
    """Where a tensor begins: number of the file, bytes."""
    return part.tensors[source][0], part.info(source).start


def _places(part: Part, source: str) -> list[tuple[Header, str]]:
    """Where a tensor lies, and behind it its scale if the file has one."""
    scales = [source.removesuffix(".weight") + suffix for suffix in WEIGHT_SCALES]
    scale = [name for name in scales if source.endswith(".weight") and name in part.tensors][:1]
    return [
        (part.headers[index], stored) for index, stored in map(part.tensors.__getitem__, [source, *scale])
    ]


def _stored(wanted: Sequence[tuple[Header, str]], placement: Placement) -> Generator[Tensor]:
    """Stored tensors in this order, on the device they go to."""
    if placement.device.type == "cuda":
        yield from read_ahead(wanted, placement.device)
        return
    with ExitStack() as stack:
        readers = {
            path: stack.enter_context(Reader(header, mmap=placement.mmap))
            for path, header in {header.path: header for header, _ in wanted}.items()
        }
        for header, name in wanted:
            yield readers[header.path].read(name).to(placement.device)


def _read(part: Part, source: str, stored: Iterator[Tensor]) -> Tensor:
    """The next stored tensor, multiplied by its scale if the file has one."""
    tensor = next(stored)
    if len(_places(part, source)) == 1:
        return tensor
    return (tensor.float() * next(stored).float()).to(_DEFAULT_WIDE)


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
