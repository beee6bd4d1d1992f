"""What LyCORIS needs so that its networks train, save and load on FLUX as their authors meant.

LyCORIS itself stays unmodified. Everything here answers a fault or a habit of lycoris-lora 4.1 that was measured; the
remark beside each says which. Nothing is imported from it before it is asked for.
"""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import MethodType
from typing import Any

import toml
import torch
from torch import Tensor, nn

from library.errors import NetworkPluginError
from library.log import warn_once
from networks import lycoris_products
from networks.options import parse_bool

logger = logging.getLogger(__name__)

PACKAGE = "lycoris"
DEFAULT_DIM = 4  # its own, when network_dim is not given
# It reads "0" and "no" as true, and does not convert decompose_both: "False" switches it on.
FLAGS = frozenset(
    {
        "use_tucker", "use_cp", "use_conv_cp", "use_scalar", "train_norm", "rescaled", "dora_wd",
        "wd_on_output", "full_matrix", "bypass_mode", "rs_lora", "unbalanced_factorization", "decompose_both",
        "train_t5xxl",
    }
)  # fmt: skip
# Algorithms whose files no other program loads; ComfyUI passes over them without a word.
NOT_IN_COMFYUI = frozenset({"ia3", "tlora"})
# Presets that find layers in FLUX, and what they find.
PRESETS = (
    "full, full-lin and attn-mlp (all Linear layers of the blocks), attn-only (attention of the double blocks), "
    "unet-only and unet-transformer-only (as full, without text encoders)"
)
# Modules whose two ways of computing agree: beside the layer ("bypass"), or by rebuilding its weight.
_BESIDE = frozenset({"LoConModule", "LohaModule", "LokrModule", "GLoRAModule"})
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
_DECOMPOSED = ".dora_scale"


def read_arguments(arguments: dict[str, object]) -> dict[str, object]:
    """`network_args` with flags as booleans, and the DoRA that ComfyUI applies as it was trained.

    ComfyUI and Forge divide by the norm of the base weight where LyCORIS, on the output axis, divides by that of the
    sum: pictures differ by up to 3 %. On the input axis all agree, so that is what `dora_wd` means unless
    `wd_on_output` is given.

    Raises `NetworkPluginError` for an algorithm whose file gives another network than the one trained.
    """
    read = {
        key: parse_bool(key, value) if key in FLAGS and isinstance(value, str) and value else value
        for key, value in arguments.items()
    }
    algorithm = str(read.get("algo") or "lora").lower()
    if algorithm == "dylora":
        raise NetworkPluginError(
            "network_args algo=dylora: LyCORIS draws another rank at every use, so the saved file is not the network "
            "that was trained; use algo=lora, and resize the file afterwards"
        )
    if read.get("dora_wd") and "wd_on_output" not in read:
        read["wd_on_output"] = False
    return read


def remarks(arguments: Mapping[str, object]) -> Iterator[str]:
    """What a user should know about `network_args`, as `read_arguments` gives them, before training."""
    algorithm = str(arguments.get("algo") or "lora").lower()
    if algorithm in NOT_IN_COMFYUI:
        yield f"network_args algo={algorithm}: ComfyUI, Forge and diffusers do not load such files"
    if arguments.get("dora_wd") and arguments.get("wd_on_output"):
        yield (
            "network_args wd_on_output=True: ComfyUI and Forge apply DoRA on the output axis differently from how it "
            "is trained; leave it out to train on the input axis, which they apply exactly"
        )


def inline_preset(arguments: Mapping[str, object]) -> dict[str, Any] | None:
    """The preset that stands in `network_args` itself, as a JSON object; None for a name or a file.

    Raises `NetworkPluginError` for text that is no JSON.
    """
    text = str(arguments.get("preset", "")).strip()
    if not text.startswith("{"):
        return None
    try:
        preset = json.loads(text)
    except json.JSONDecodeError as error:
        raise NetworkPluginError(
            f"network_args preset={text}: this is no JSON object ({error}); give a name, a .toml file or JSON"
        ) from None
    return dict(preset)


@contextmanager
def preset_as_file(arguments: Mapping[str, object]) -> Iterator[Mapping[str, object]]:
    """`network_args` as LyCORIS reads them: it knows presets by name or as a TOML file, not as text.

    With the text in network_args, the metadata of saved files holds the whole preset, and no rank waits for a file.
    """
    preset = inline_preset(arguments)
    if preset is None:
        yield arguments
        return
    with tempfile.TemporaryDirectory(prefix="polyrank-") as folder:
        file = Path(folder) / "preset.toml"
        file.write_text(toml.dumps(preset), encoding="utf-8")
        yield {**arguments, "preset": str(file)}


@contextmanager
def fresh_presets() -> Iterator[type]:
    """Its network class, with targets that no earlier network of this process has changed.

    A preset is written into class attributes and stays there; one that lacks a key inherits the last one's.
    """
    cls: type = importlib.import_module("lycoris.kohya").LycorisNetworkKohya
    names = [name for name in vars(cls) if name.isupper()]
    before = {name: getattr(cls, name) for name in names}
    try:
        yield cls
    finally:
        for name, value in before.items():
            setattr(cls, name, value)


@contextmanager
def targets(
    arguments: Mapping[str, object], *, dim: int, models: Sequence[nn.Module]
) -> Iterator[Mapping[str, object]]:
    """Surround `create_network`, which gets what this yields for its arguments.

    Presets are fresh and may be text in `arguments`; for BOFT no layer is chosen that it cannot decompose.

    BOFT needs an output size of an even number up to `dim` times a power of two; of FLUX's sizes, 21504 (linear1 of
    single blocks) is none. Raises `NetworkPluginError` when a preset's own exclude_name leaves such a layer in.
    """
    with fresh_presets() as cls, preset_as_file(arguments) as read:
        if arguments.get("algo") != "boft":
            yield read
            return
        left_out = _undecomposable(dim, models)
        if left_out:
            sizes = ", ".join(str(size) for size in sorted(set(left_out.values())))
            logger.warning(
                "algo=boft with network_dim = %d cannot decompose output sizes %s: %d layers are left out",
                dim, sizes, len(left_out),
            )  # fmt: skip
        cls.TARGET_EXCLUDE_NAME = [*cls.TARGET_EXCLUDE_NAME, *left_out]  # type: ignore[attr-defined]
        try:
            yield read
        except ValueError as error:
            raise NetworkPluginError(
                f"network_args algo=boft: {error} Add that layer to the preset's exclude_name, or raise network_dim"
            ) from error


def _undecomposable(dim: int, models: Sequence[nn.Module]) -> dict[str, int]:
    """Paths and output sizes of Linear layers that BOFT refuses at this `dim`."""
    factorize = importlib.import_module("lycoris.functional").power2factorization
    return {
        name: layer.out_features
        for model in models
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and factorize(layer.out_features, dim)[1] == 0
    }


def settle(network: Any, *, asked_bypass: bool) -> None:
    """Choose how a made network computes; before it is applied. Raises `NetworkPluginError` for what cannot work.

    By default LyCORIS rebuilds the layer's weight and takes the difference in that weight's dtype: in bfloat16 a
    change below 1/256 of a weight is rounded away, 8-bit weights cannot be added to at all, and the difference, as
    large as the weight, is kept for the backward pass. So it adds its product to the layer's output where it can,
    with as little arithmetic as it takes (`networks.lycoris_products`), unless network_args chose (`asked_bypass`).
    Where it has to rebuild (DoRA, its rank_dropout, other algorithms), 8-bit weights are refused and 16-bit ones
    warned of.
    """
    for module in (*network.text_encoder_loras, *network.unet_loras):
        decomposed, kind = getattr(module, "wd", False), type(module).__name__
        if kind in _BESIDE and not asked_bypass and not decomposed and not module.rank_dropout:
            module.bypass_mode = True
            lycoris_products.install(module)
        if decomposed and module.bypass_mode:
            raise NetworkPluginError(
                "network_args: bypass_mode=True leaves dora_wd without effect; drop one of them"
            )
        if decomposed:
            _interpolate(module)
        weight = getattr(module.org_module[0], "weight", None)
        if module.bypass_mode or weight is None:
            continue
        if weight.dtype in _EIGHT_BITS:
            raise NetworkPluginError(
                f"LyCORIS's {kind} rebuilds base weights with these network_args, which 8 bits do not "
                "allow; drop fp8_base and base_compute, or use algo=lokr, loha, glora or locon without dora_wd "
                "and rank_dropout"
            )
        if weight.dtype in (torch.bfloat16, torch.float16):
            warn_once(
                logger,
                "LyCORIS's %s adds to base weights in 16 bits, where small changes are rounded away; "
                "algo=locon, loha, lokr or glora without dora_wd and rank_dropout do not",
                kind,
            )


def limits_norms(network: Any) -> bool:
    """Whether any layer does something for scale_weight_norms: most algorithms pass over it without a word."""
    base: Any = importlib.import_module("lycoris.modules.base").LycorisBaseModule
    modules = (*network.text_encoder_loras, *network.unet_loras)
    return any(type(module).apply_max_norm is not base.apply_max_norm for module in modules)


def _interpolate(module: Any) -> None:
    """Let the strength of a DoRA layer run from the base (0) to what was trained (1), as ComfyUI applies it.

    LyCORIS's own strength weighs only the norm: at 0 the layer still is not the base.
    """
    original: Callable[..., Tensor] = module.forward

    def forward(self: Any, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
        strength = self.multiplier
        if strength == 1:
            return original(x, *arguments, **options)
        base: Tensor = self.org_forward(x, *arguments, **options)
        if strength == 0:
            return base
        self.multiplier = 1
        try:
            trained = original(x, *arguments, **options)
        finally:
            self.multiplier = strength
        mixed: Tensor = base + strength * (trained - base)
        return mixed

    module.__dict__["forward"] = MethodType(forward, module)


def from_file(
    create: Any,
    tensors: Mapping[str, Tensor],
    *,
    strength: float,
    text_encoders: list[nn.Module],
    transformer: nn.Module,
) -> Any:
    """The network that a file holds, by `create` (its `create_network_from_weights`); not yet applied.

    Layers of kinds that it rebuilds wrongly are made here: IA3 (a TypeError there) and DoRA on the input axis (taken
    for the output axis there).
    """
    names = {key.split(".")[0] for key in tensors}
    mine = {name for name in names if _is_input_axis_dora(tensors, name) or f"{name}.on_input" in tensors}
    plain = {key: tensor for key, tensor in tensors.items() if key.split(".")[0] not in mine}
    with fresh_presets():
        network, _ = create(strength, "weights", None, text_encoders, transformer, weights_sd=plain)
    layers = _layers(text_encoders, transformer)
    for name in sorted(mine & layers.keys()):
        module = _make(name, layers[name], tensors)
        module.multiplier = strength
        side = network.unet_loras if name.startswith("lora_unet_") else network.text_encoder_loras
        side.append(module)
    return network


def _is_input_axis_dora(tensors: Mapping[str, Tensor], name: str) -> bool:
    scale = tensors.get(name + _DECOMPOSED)
    return scale is not None and scale.shape[0] == 1


def _layers(text_encoders: Sequence[nn.Module], transformer: nn.Module) -> dict[str, Any]:
    """Layers by the names that its files have."""
    roots = {"lora_unet": transformer} | {
        f"lora_te{i}": model for i, model in enumerate(text_encoders, start=1)
    }
    return {
        f"{prefix}_{path}".replace(".", "_"): layer
        for prefix, root in roots.items()
        for path, layer in root.named_modules()
    }


@torch.no_grad()
def _make(name: str, layer: Any, tensors: Mapping[str, Tensor]) -> Any:
    modules = importlib.import_module("lycoris.modules")
    leaves = {key.partition(".")[2]: tensor for key, tensor in tensors.items() if key.startswith(f"{name}.")}
    if "on_input" in leaves:
        module = modules.IA3Module(name, layer, 1, train_on_input=bool(leaves["on_input"]))
        module.weight.copy_(leaves["weight"])
        return module
    kind, values = modules.get_module({k: v for k, v in tensors.items() if k != name + _DECOMPOSED}, name)
    module = modules.make_module(kind, values, name, layer)
    module.wd, module.wd_on_out = True, False
    module.dora_norm_dims = layer.weight.dim() - 1
    module.dora_scale = nn.Parameter(leaves["dora_scale"].float())
    return module


@torch.no_grad()
def before_loading(network: nn.Module) -> None:
    """Put the layers of algo=full back to the base: loading a file adds its differences to what is there."""
    for found in network.modules():
        module: Any = found
        if type(module).__name__ == "FullModule" and not module.is_diff:
            module.weight.copy_(module.org_weight)
            if module.org_bias is not None:
                module.bias.copy_(module.org_bias[0])


@torch.no_grad()
def merge_full(network: Any, strength: float) -> None:
    """Add the differences of algo=full to the base weights and drop those layers. Before `apply_to`.

    Once applied, such a module has taken the weight off its layer, so what it does cannot be measured there.
    """
    merged = set()
    for module in (*network.text_encoder_loras, *network.unet_loras):
        if type(module).__name__ != "FullModule":
            continue
        layer = module.org_module[0]
        layer.weight.copy_(layer.weight.float() + strength * module.weight.to(layer.weight.device).float())
        if module.bias is not None:
            layer.bias.copy_(layer.bias.float() + strength * module.bias.to(layer.bias.device).float())
        merged.add(module)
    network.text_encoder_loras = [m for m in network.text_encoder_loras if m not in merged]
    network.unet_loras = [m for m in network.unet_loras if m not in merged]
