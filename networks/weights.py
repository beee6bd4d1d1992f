"""Adapter files of `networks.lora_flux`: reading, checking, grouping by layer, writing with hashes.

The layout is Kohya's: per layer `<name>.lora_down.weight` [rank, in], `<name>.lora_up.weight` [out, rank]
and a scalar `<name>.alpha`. Other layouts and other kinds of adapters are refused in words rather than half
loaded.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from library.errors import CheckpointError
from library.files.atomic import replacing
from library.files.hashes import adapter_hashes
from library.files.safetensors import load_file, save_file

DOWN = "lora_down.weight"
UP = "lora_up.weight"
ALPHA = "alpha"
_OTHER_LAYOUTS = ("transformer.", "diffusion_model.", "text_encoder.", "base_model.model.")


@dataclass(frozen=True, slots=True)
class LayerWeights:
    """The trained factors of one layer."""

    down: Tensor  # [rank, in]
    up: Tensor  # [out, rank]
    alpha: float

    @property
    def rank(self) -> int:
        """Width between the factors."""
        return self.down.shape[0]


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of an adapter file on the CPU, .safetensors or one written by torch.save."""
    file = Path(path)
    if not file.is_file():
        raise CheckpointError(f"adapter file {file} does not exist")
    if file.suffix == ".safetensors":
        return load_file(file)
    try:
        loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError) as error:
        raise CheckpointError(
            f"adapter file {file} is no file of tensors by torch.save; copy it again"
        ) from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"adapter file {file} holds a {type(loaded).__name__} and no tensors by name")
    return {str(name): tensor for name, tensor in loaded.items() if isinstance(tensor, Tensor)}


def is_plain_lora(tensors: Mapping[str, Tensor]) -> bool:
    """Whether every leaf is one of a LoRA in Kohya's layout."""
    return all(key.partition(".")[2] in (DOWN, UP, ALPHA) for key in tensors)


def group(tensors: Mapping[str, Tensor], *, origin: str) -> dict[str, LayerWeights]:
    """Tensors by layer. No alpha means alpha = rank. `origin` names the file in errors.

    Raises `CheckpointError` for leaves that are not plain LoRA or a layer that lacks one of its factors.
    """
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, leaf = key.partition(".")
        if key.startswith(_OTHER_LAYOUTS):
            raise CheckpointError(
                f"{origin}: {key} is of the diffusers or ComfyUI layout; convert the file to Kohya's "
                "(lora_unet_..., lora_down, lora_up)"
            )
        if leaf not in (DOWN, UP, ALPHA):
            raise CheckpointError(
                f"{origin}: {key} belongs to no LoRA; LyCORIS files load with network_module = lycoris.kohya"
            )
        layers.setdefault(name, {})[leaf] = tensor
    grouped = {}
    for name, leaves in layers.items():
        missing = [leaf for leaf in (DOWN, UP) if leaf not in leaves]
        if missing:
            raise CheckpointError(f"{origin}: {name} lacks {' and '.join(missing)}")
        alpha = float(leaves[ALPHA]) if ALPHA in leaves else float(leaves[DOWN].shape[0])
        grouped[name] = LayerWeights(down=leaves[DOWN], up=leaves[UP], alpha=alpha)
    return grouped


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None,
    metadata: Mapping[str, str] | None,
) -> None:
    """Write tensors whole, cast to `dtype` if given, with metadata and hashes (safetensors only)."""
    file = Path(path)
    ready = {
        name: tensor.detach().to(device="cpu", dtype=dtype or tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }
    if file.suffix != ".safetensors":
        with replacing(file) as temporary:
            torch.save(ready, temporary)
        return
    hashes = adapter_hashes(ready, metadata or {})
    values = {**(metadata or {}), "sshs_model_hash": hashes.model, "sshs_legacy_hash": hashes.legacy}
    save_file(file, ready, values)
