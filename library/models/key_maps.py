"""Key names of other layouts, as tables that are read in both directions.

Ours are Black Forest Labs' names for the transformer and the autoencoder, and transformers 4's for the text
encoders. A `Recipe` says how one of our tensors is made of another layout's; the same recipe undoes it.
Only names and shapes are treated here; reading is in `library.models.load`.

Sources: the key lists of the published checkpoints, diffusers 0.32 to 0.42, transformers 4.57 to 5.23,
ComfyUI.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from library.models.params import AutoEncoderParams, FluxParams, count

# --- the transformer: ours, then what is stacked along the first axis to make it ------------------

_EMBEDDERS: tuple[tuple[str, str], ...] = (
    ("time_in.in_layer", "time_text_embed.timestep_embedder.linear_1"),
    ("time_in.out_layer", "time_text_embed.timestep_embedder.linear_2"),
    ("vector_in.in_layer", "time_text_embed.text_embedder.linear_1"),
    ("vector_in.out_layer", "time_text_embed.text_embedder.linear_2"),
    ("txt_in", "context_embedder"),
    ("img_in", "x_embedder"),
    ("final_layer.linear", "proj_out"),
)
_GUIDANCE: tuple[tuple[str, str], ...] = (
    ("guidance_in.in_layer", "time_text_embed.guidance_embedder.linear_1"),
    ("guidance_in.out_layer", "time_text_embed.guidance_embedder.linear_2"),
)
_DOUBLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("img_mod.lin", ("norm1.linear",)),
    ("txt_mod.lin", ("norm1_context.linear",)),
    ("img_attn.qkv", ("attn.to_q", "attn.to_k", "attn.to_v")),
    ("txt_attn.qkv", ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj")),
    ("img_mlp.0", ("ff.net.0.proj",)),
    ("img_mlp.2", ("ff.net.2",)),
    ("txt_mlp.0", ("ff_context.net.0.proj",)),
    ("txt_mlp.2", ("ff_context.net.2",)),
    ("img_attn.proj", ("attn.to_out.0",)),
    ("txt_attn.proj", ("attn.to_add_out",)),
)
_SINGLE: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("modulation.lin", ("norm.linear",)),
    ("linear1", ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
    ("linear2", ("proj_out",)),
)
_DOUBLE_NORMS: tuple[tuple[str, str], ...] = (
    ("img_attn.norm.query_norm", "attn.norm_q"),
    ("img_attn.norm.key_norm", "attn.norm_k"),
    ("txt_attn.norm.query_norm", "attn.norm_added_q"),
    ("txt_attn.norm.key_norm", "attn.norm_added_k"),
)
_SINGLE_NORMS: tuple[tuple[str, str], ...] = (
    ("norm.query_norm", "attn.norm_q"),
    ("norm.key_norm", "attn.norm_k"),
)

# --- the autoencoder ------------------------------------------------------------------------------

_RESNET: tuple[tuple[str, str], ...] = (
    ("norm1", "norm1"),
    ("conv1", "conv1"),
    ("norm2", "norm2"),
    ("conv2", "conv2"),
    ("nin_shortcut", "conv_shortcut"),
)
_ATTENTION: tuple[tuple[str, str], ...] = (
    ("norm", "group_norm"),
    ("q", "to_q"),
    ("k", "to_k"),
    ("v", "to_v"),
    ("proj_out", "to_out.0"),
)

# --- parts of a checkpoint that holds several models: prefix, model -------------------------------

PREFIXES: tuple[tuple[str, str], ...] = (
    ("model.diffusion_model.", "main"),
    ("text_encoders.clip_l.transformer.", "clip_l"),
    ("text_encoders.t5xxl.transformer.", "t5xxl"),
    ("text_encoders.clip_l.", "clip_l"),
    ("text_encoders.t5xxl.", "t5xxl"),
    ("first_stage_model.", "ae"),
    ("vae.", "ae"),
)

# Tensors that a file of the kind may hold and the encoder does not need.
_UNUSED: Mapping[str, str] = {
    "clip_l": r"vision_model\.|visual_projection\.|text_projection|logit_scale|.*\.position_ids$",
    "t5xxl": r"decoder\.|lm_head\.|logit_scale|spiece_model",
    "ae": r"quant_conv\.|post_quant_conv\.",
    "flux": r"$^",
}

# Scales that ComfyUI's fp8 files store beside a weight; it is multiplied by the first that is there.
WEIGHT_SCALES: tuple[str, ...] = (".scale_weight", ".weight_scale")
_SCALE_EXTRAS = re.compile(
    r"(^|.*\.)(scaled_fp8|scale_weight|weight_scale|scale_input|input_scale|comfy_quant)$"
)


@dataclass(frozen=True, slots=True)
class Recipe:
    """How one of our tensors is made of another layout's tensors.

    `sources` are stacked along the first axis in order. `swap_halves` exchanges the halves of the first axis
    afterwards: shift and scale of the last layer are stored the other way round.
    """

    sources: tuple[str, ...]
    swap_halves: bool = False

    def build(self, tensors: list[Tensor], shape: torch.Size) -> Tensor:
        """Our tensor, of `shape`, from those named by `sources`; a linear may become a 1x1 convolution."""
        tensor = tensors[0] if len(tensors) == 1 else torch.cat(tensors)
        if self.swap_halves:
            tensor = torch.cat(tensor.chunk(2)[::-1])
        same = tensor.numel() == shape.numel() and tensor.shape[:1] == shape[:1]
        return tensor.reshape(shape) if same else tensor


def flux_from_diffusers(*, depth: int, depth_single_blocks: int, guidance: bool) -> dict[str, Recipe]:
    """Our name of every transformer tensor, with its recipe from the names of diffusers."""
    recipes: dict[str, Recipe] = {}
    for ours, theirs in _EMBEDDERS + (_GUIDANCE if guidance else ()):
        _add_layer(recipes, ours, (theirs,))
    for kind in ("weight", "bias"):
        recipes[f"final_layer.adaLN_modulation.1.{kind}"] = Recipe(
            (f"norm_out.linear.{kind}",), swap_halves=True
        )
    blocks = (
        ("double_blocks", "transformer_blocks", depth, _DOUBLE, _DOUBLE_NORMS),
        ("single_blocks", "single_transformer_blocks", depth_single_blocks, _SINGLE, _SINGLE_NORMS),
    )
    for our_list, their_list, number, layers, norms in blocks:
        for index in range(number):
            for ours, parts in layers:
                _add_layer(
                    recipes,
                    f"{our_list}.{index}.{ours}",
                    tuple(f"{their_list}.{index}.{part}" for part in parts),
                )
            for ours, theirs in norms:
                recipes[f"{our_list}.{index}.{ours}.scale"] = Recipe(
                    (f"{their_list}.{index}.{theirs}.weight",)
                )
    return recipes


def flux_recipes(names: Iterable[str]) -> dict[str, Recipe]:
    """The recipes for a transformer whose tensors have these diffusers names."""
    found = set(names)
    return flux_from_diffusers(
        depth=count(found, r"transformer_blocks\.(\d+)\."),
        depth_single_blocks=count(found, r"single_transformer_blocks\.(\d+)\."),
        guidance=f"{_GUIDANCE[0][1]}.weight" in found,
    )


def autoencoder_recipes(*, levels: int, num_res_blocks: int, names: Iterable[str]) -> dict[str, Recipe]:
    """Our name of every autoencoder tensor, with its recipe from those of diffusers' `names` that exist."""
    pairs = list(_autoencoder_layers(levels, num_res_blocks))
    found = set(names)
    recipes: dict[str, Recipe] = {}
    for ours, theirs in pairs:
        if f"{theirs}.weight" in found:
            _add_layer(recipes, ours, (theirs,))
    return recipes


def autoencoder_recipes_for(names: Iterable[str]) -> dict[str, Recipe]:
    """The recipes for an autoencoder whose tensors have these diffusers names."""
    found = set(names)
    return autoencoder_recipes(
        levels=count(found, r"encoder\.down_blocks\.(\d+)\."),
        num_res_blocks=count(found, r"encoder\.down_blocks\.0\.resnets\.(\d+)\."),
        names=found,
    )


def flux_to_diffusers(tensors: Mapping[str, Tensor], params: FluxParams) -> dict[str, Tensor]:
    """Transformer tensors under our names, as diffusers names and splits them."""
    recipes = flux_from_diffusers(
        depth=params.depth, depth_single_blocks=params.depth_single_blocks, guidance=params.guidance_embed
    )
    hidden = params.hidden_size
    ends = [hidden, 2 * hidden, 3 * hidden]
    result: dict[str, Tensor] = {}
    for ours, recipe in recipes.items():
        tensor = torch.cat(tensors[ours].chunk(2)[::-1]) if recipe.swap_halves else tensors[ours]
        parts = tensor.tensor_split(ends[: len(recipe.sources) - 1])
        result.update(zip(recipe.sources, parts, strict=True))
    return result


def autoencoder_to_diffusers(tensors: Mapping[str, Tensor], params: AutoEncoderParams) -> dict[str, Tensor]:
    """Autoencoder tensors under our names, as diffusers names and shapes them."""
    result: dict[str, Tensor] = {}
    for ours, theirs in _autoencoder_layers(len(params.ch_mult), params.num_res_blocks):
        for kind in ("weight", "bias"):
            if f"{ours}.{kind}" in tensors:
                tensor = tensors[f"{ours}.{kind}"]
                is_linear = ".attentions." in theirs and tensor.ndim == 4
                result[f"{theirs}.{kind}"] = tensor.flatten(1) if is_linear else tensor
    return result


def text_encoder_name(kind: str, name: str) -> str:
    """Our name of a text encoder's tensor: `text_model.*` for CLIP, `shared.weight` for T5's embedding."""
    if kind == "clip_l":
        return name if name.startswith("text_model.") else f"text_model.{name}"
    return "shared.weight" if name == "encoder.embed_tokens.weight" else name


def is_unused(kind: str, name: str) -> bool:
    """Whether a file of this kind may hold `name` without the model needing it."""
    return re.match(_UNUSED[kind], name) is not None or _SCALE_EXTRAS.match(name) is not None


def split_parts(names: Iterable[str]) -> dict[str, dict[str, str]]:
    """Sort the names of a file by model: {"main" | "clip_l" | "t5xxl" | "ae": {name without prefix: stored
    name}}.

    Every name is looked at on its own, so a file in which only some names carry a prefix is read as well.
    """
    parts: dict[str, dict[str, str]] = {}
    for name in names:
        prefix, part = next(((p, part) for p, part in PREFIXES if name.startswith(p)), ("", "main"))
        parts.setdefault(part, {})[name[len(prefix) :]] = name
    return parts


def _add_layer(recipes: dict[str, Recipe], ours: str, parts: tuple[str, ...]) -> None:
    for kind in ("weight", "bias"):
        recipes[f"{ours}.{kind}"] = Recipe(tuple(f"{part}.{kind}" for part in parts))


def _autoencoder_layers(levels: int, num_res_blocks: int) -> Iterator[tuple[str, str]]:
    """Pairs of our and diffusers' layer names, those included that a model need not have (shortcuts)."""
    for side in ("encoder", "decoder"):
        yield f"{side}.conv_in", f"{side}.conv_in"
        yield f"{side}.norm_out", f"{side}.conv_norm_out"
        yield f"{side}.conv_out", f"{side}.conv_out"
        for number in (1, 2):
            for ours, theirs in _RESNET:
                yield f"{side}.mid.block_{number}.{ours}", f"{side}.mid_block.resnets.{number - 1}.{theirs}"
        for ours, theirs in _ATTENTION:
            yield f"{side}.mid.attn_1.{ours}", f"{side}.mid_block.attentions.0.{theirs}"
    for level in range(levels):
        mirrored = levels - 1 - level  # diffusers counts the decoder's levels from the lowest resolution
        yield f"encoder.down.{level}.downsample.conv", f"encoder.down_blocks.{level}.downsamplers.0.conv"
        yield f"decoder.up.{level}.upsample.conv", f"decoder.up_blocks.{mirrored}.upsamplers.0.conv"
        for block in range(num_res_blocks + 1):
            for ours, theirs in _RESNET:
                yield (
                    f"encoder.down.{level}.block.{block}.{ours}",
                    f"encoder.down_blocks.{level}.resnets.{block}.{theirs}",
                )
                yield (
                    f"decoder.up.{level}.block.{block}.{ours}",
                    f"decoder.up_blocks.{mirrored}.resnets.{block}.{theirs}",
                )
