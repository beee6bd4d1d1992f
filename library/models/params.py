"""Sizes of the four models, read from tensor shapes alone.

A checkpoint's header tells every size but a few: rotary axes, attention heads of CLIP, scale of the
latents. Those follow a rule stated here, and `config.json` of a diffusers folder or a `config` entry in the
file's metadata overrides it. Shapes are given under Black Forest Labs' and transformers' key names; other
layouts are renamed first, in `library.models.key_maps`. No weights are read here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

Shapes = Mapping[str, tuple[int, ...]]  # tensor name to shape
Settings = Mapping[str, object]  # a config.json, or the metadata entry that stands for one


@dataclass(frozen=True, slots=True)
class FluxParams:
    """Sizes of a FLUX.1 transformer; the defaults are those of FLUX.1-dev."""

    in_channels: int = 64
    out_channels: int = 64
    vec_in_dim: int = 768  # width of the pooled CLIP vector
    context_in_dim: int = 4096  # width of a T5 token
    hidden_size: int = 3072
    num_heads: int = 24
    mlp_hidden: int = 12288
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: float = 10000.0
    qkv_bias: bool = True
    guidance_embed: bool = True

    @classmethod
    def from_shapes(cls, shapes: Shapes, settings: Settings) -> FluxParams:
        """Sizes from tensors under our names; `settings` is a diffusers transformer config, or {}."""
        hidden, in_channels = shapes["img_in.weight"]
        head = shapes["double_blocks.0.img_attn.norm.query_norm.scale"][0]
        return cls(
            in_channels=in_channels,
            out_channels=shapes["final_layer.linear.weight"][0],
            vec_in_dim=shapes["vector_in.in_layer.weight"][1],
            context_in_dim=shapes["txt_in.weight"][1],
            hidden_size=hidden,
            num_heads=hidden // head,
            mlp_hidden=shapes["double_blocks.0.img_mlp.0.weight"][0],
            depth=count(shapes, r"double_blocks\.(\d+)\."),
            depth_single_blocks=count(shapes, r"single_blocks\.(\d+)\."),
            axes_dim=_integers(settings.get("axes_dims_rope")) or rotary_axes(head),
            qkv_bias="double_blocks.0.img_attn.qkv.bias" in shapes,
            guidance_embed="guidance_in.in_layer.weight" in shapes,
        )


@dataclass(frozen=True, slots=True)
class AutoEncoderParams:
    """Sizes of a FLUX.1 autoencoder, and scale and shift of the transformer's latents."""

    in_channels: int = 3
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    num_groups: int = 32  # of every group normalisation
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @classmethod
    def from_shapes(cls, shapes: Shapes, settings: Settings) -> AutoEncoderParams:
        """Sizes from tensors under our names; `settings` is a diffusers VAE config, or {}."""
        ch, in_channels = shapes["encoder.conv_in.weight"][:2]
        levels = count(shapes, r"encoder\.down\.(\d+)\.")
        widths = [shapes[f"encoder.down.{i}.block.0.conv1.weight"][0] for i in range(levels)]
        return cls(
            in_channels=in_channels,
            ch=ch,
            ch_mult=tuple(width // ch for width in widths),
            num_res_blocks=count(shapes, r"encoder\.down\.0\.block\.(\d+)\."),
            z_channels=shapes["decoder.conv_in.weight"][1],
            num_groups=_integer(settings.get("norm_num_groups"), 32),
            scale_factor=_number(settings.get("scaling_factor"), 0.3611),
            shift_factor=_number(settings.get("shift_factor"), 0.1159),
        )


@dataclass(frozen=True, slots=True)
class ClipParams:
    """Sizes of a CLIP text encoder; the defaults are those of CLIP-L."""

    vocab_size: int = 49408
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_layers: int = 12
    num_heads: int = 12
    max_positions: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_shapes(cls, shapes: Shapes, settings: Settings) -> ClipParams:
        """Sizes from tensors named `text_model.*`; `settings` is a CLIP text config, or {}."""
        vocab, hidden = shapes["text_model.embeddings.token_embedding.weight"]
        if settings.get("hidden_size", hidden) != hidden:  # the config of another model in the same folder
            settings = {}
        return cls(
            vocab_size=vocab,
            hidden_size=hidden,
            intermediate_size=shapes["text_model.encoder.layers.0.mlp.fc1.weight"][0],
            num_layers=count(shapes, r"text_model\.encoder\.layers\.(\d+)\."),
            num_heads=_integer(settings.get("num_attention_heads"), max(1, hidden // 64)),
            max_positions=shapes["text_model.embeddings.position_embedding.weight"][0],
            hidden_act=str(settings.get("hidden_act", "quick_gelu")),
            layer_norm_eps=_number(settings.get("layer_norm_eps"), 1e-5),
        )


@dataclass(frozen=True, slots=True)
class T5Params:
    """Sizes of a T5 v1.1 encoder; the defaults are those of T5-XXL."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    num_buckets: int = 32  # of relative positions

    @classmethod
    def from_shapes(cls, shapes: Shapes, settings: Settings) -> T5Params:
        """Sizes from tensors under transformers' names; shapes tell every one, so `settings` is unused."""
        vocab, width = shapes["shared.weight"]
        attention = "encoder.block.0.layer.0.SelfAttention"
        buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"]
        return cls(
            vocab_size=vocab,
            d_model=width,
            d_kv=shapes[f"{attention}.q.weight"][0] // heads,
            d_ff=shapes["encoder.block.0.layer.1.DenseReluDense.wi_0.weight"][0],
            num_layers=count(shapes, r"encoder\.block\.(\d+)\."),
            num_heads=heads,
            num_buckets=buckets,
        )


def rotary_axes(head_dim: int) -> tuple[int, int, int]:
    """How a head's width is shared among the rotary axes (time, row, column): 128 is (16, 56, 56), 16 is
    (4, 6, 6).

    No tensor tells this. Time gets the smallest even width of at least an eighth that leaves two equal even
    widths.
    """
    time = next(
        t
        for t in range(2, head_dim + 1, 2)
        if t >= head_dim / 8 and head_dim - t >= 0 and (head_dim - t) % 4 == 0
    )
    rest = (head_dim - time) // 2
    return time, rest, rest


def count(names: Iterable[str], pattern: str) -> int:
    """One more than the largest number that `pattern` captures at the start of a name; 0 if none."""
    found = (re.match(pattern, name) for name in names)
    return max((int(match[1]) + 1 for match in found if match), default=0)


def _integers(value: object) -> tuple[int, ...]:
    return tuple(int(one) for one in value) if isinstance(value, (list, tuple)) else ()


def _integer(value: object, default: int) -> int:
    return value if isinstance(value, int) else default


def _number(value: object, default: float) -> float:
    return float(value) if isinstance(value, (int, float)) else default
