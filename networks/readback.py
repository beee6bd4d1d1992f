"""Reading a saved adapter file as a stranger would: names, shapes, numbers, effect.

Which names and leaves other programs take was found by running them: ComfyUI, Forge and diffusers on tiny FLUX models.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from networks import weights

_EMBEDDERS = "img_in|txt_in|(time|vector|guidance)_in_(in|out)_layer"
_LAYER = re.compile(
    r"lora_unet_(double_blocks_\d+_(img|txt)_(mod_lin|attn_qkv|attn_proj|mlp_[02])"
    rf"|single_blocks_\d+_(linear[12]|modulation_lin)|{_EMBEDDERS})"
    r"|lora_te1_text_model_encoder_layers_\d+_(self_attn_(q|k|v|out)_proj|mlp_fc[12])"
    r"|oft_unet_\w+"  # Kohya's networks.oft_flux
    r"|lora_te[23]_encoder_block_\d+_layer_(0_SelfAttention_[qkvo]|1_DenseReluDense_(wi_[01]|wo))"
)
# Leaves by kind of adapter: those that must be there together, then those that may.
_KINDS: tuple[tuple[frozenset[str], frozenset[str]], ...] = tuple(
    (frozenset(needed.split()), frozenset(f"alpha dora_scale {more}".split()))
    for needed, more in (
        ("lora_down.weight lora_up.weight", "lora_mid.weight"),
        ("hada_w1_a hada_w1_b hada_w2_a hada_w2_b", "hada_t1 hada_t2"),
        ("lokr_w1 lokr_w2", ""),
        ("lokr_w1_a lokr_w1_b lokr_w2", ""),
        ("lokr_w1 lokr_w2_a lokr_w2_b", "lokr_t2"),
        ("lokr_w1_a lokr_w1_b lokr_w2_a lokr_w2_b", "lokr_t2"),
        ("a1.weight a2.weight b1.weight b2.weight", "bm.weight"),
        ("oft_blocks", "rescale"),
        ("diff", "diff_b"),
    )
)
_OFT_FLUX = "oft_blocks.0"  # one leaf for each part of a fused projection
_PLAIN = frozenset({"lora_down.weight", "lora_up.weight", "alpha"})
_EMBEDDER_LAYER = re.compile(f"lora_unet_({_EMBEDDERS})")


@dataclass(frozen=True, slots=True)
class Report:
    """What a file holds. `problems` are sentences' ends about what others would lose or get wrong."""

    num_layers: int
    num_silent: int  # layers that change nothing
    readers: str  # the programs that load all of it
    problems: tuple[str, ...]


def read_back(path: Path) -> Report:
    """Look at the adapter file `path`. Raises CheckpointError when it cannot be read at all."""
    layers: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.read(path).items():
        name, _, leaf = key.partition(".")
        layers.setdefault(name, {})[leaf] = tensor
    silent = sum(_is_silent(leaves) for leaves in layers.values())
    problems = [
        _listed(
            layers, lambda name, _: _LAYER.fullmatch(name) is None, "has a name that no other program knows"
        ),
        _listed(layers, lambda _, leaves: not _known(leaves), "is of a kind that no other program loads"),
        _listed(layers, lambda _, leaves: not _fits(leaves), "has factors whose shapes do not fit together"),
        _listed(layers, lambda _, leaves: not _finite(leaves), "has numbers that are not finite"),
    ]
    if layers and silent == len(layers):
        problems.append("no layer changes anything: every product is zero")
    if not layers:
        problems.append("it holds no layer")
    return Report(len(layers), silent, _readers(layers), tuple(problem for problem in problems if problem))


def _listed(
    layers: Mapping[str, dict[str, Tensor]], wrong: Callable[[str, dict[str, Tensor]], bool], what: str
) -> str:
    names = [name for name, leaves in layers.items() if wrong(name, leaves)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{names[0]}{more} {what}" if names else ""


def _known(leaves: Mapping[str, Tensor]) -> bool:
    return _OFT_FLUX in leaves or any(needed <= leaves.keys() <= needed | more for needed, more in _KINDS)


def _fits(leaves: Mapping[str, Tensor]) -> bool:
    pairs = (
        ("lora_up.weight", "lora_down.weight"), ("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"),
        ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"),
    )  # fmt: skip
    return all(
        leaves[left].shape[1] == leaves[right].shape[0]
        for left, right in pairs
        if left in leaves and right in leaves and leaves[left].dim() == leaves[right].dim() == 2
    )


def _finite(leaves: Mapping[str, Tensor]) -> bool:
    return all(bool(torch.isfinite(tensor.float()).all()) for tensor in leaves.values())


def _is_silent(leaves: Mapping[str, Tensor]) -> bool:
    """Whether a layer adds nothing: one factor of its product is zero. A DoRA's norms may act alone."""
    alive = {leaf for leaf, tensor in leaves.items() if bool(tensor.any())}
    if "dora_scale" in leaves:
        return False
    if _OFT_FLUX in leaves:
        return not any(leaf.startswith("oft_blocks") for leaf in alive)
    products = [needed for needed, _ in _KINDS if needed <= leaves.keys()]
    if "a1.weight" in leaves:  # GLoRA: W (1 + a) + b
        return not ({"a1.weight", "a2.weight"} <= alive or {"b1.weight", "b2.weight"} <= alive)
    if "diff" in leaves:
        return not alive & {"diff", "diff_b"}
    return bool(products) and not any(needed <= alive for needed in products)


def _readers(layers: Mapping[str, dict[str, Tensor]]) -> str:
    """diffusers takes plain LoRA only, and neither T5 nor layers outside the blocks."""
    if any(_OFT_FLUX in leaves for leaves in layers.values()):
        return "Kohya's tools"
    simple = all(leaves.keys() <= _PLAIN for leaves in layers.values())
    inside = not any(name.startswith("lora_te3_") or _EMBEDDER_LAYER.fullmatch(name) for name in layers)
    return "ComfyUI, Forge and diffusers" if simple and inside else "ComfyUI and Forge"
