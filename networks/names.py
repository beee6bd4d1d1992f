"""The names one layer of the transformer has elsewhere, for regular expressions that pick layers by name.

People write such expressions against Kohya's names (lora_unet_single_blocks_7_linear2), Black Forest Labs'
(single_blocks.7.linear2) or diffusers' (transformer.single_transformer_blocks.7.proj_out). diffusers keeps
apart what is one layer here, so a layer has up to four names there.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

# List of blocks here -> the list in diffusers, and the layers of a block.
_BLOCKS: Mapping[str, tuple[str, Mapping[str, tuple[str, ...]]]] = {
    "double_blocks": (
        "transformer_blocks",
        {
            "img_mod.lin": ("norm1.linear",),
            "txt_mod.lin": ("norm1_context.linear",),
            "img_attn.qkv": ("attn.to_q", "attn.to_k", "attn.to_v"),
            "txt_attn.qkv": ("attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"),
            "img_attn.proj": ("attn.to_out.0",),
            "txt_attn.proj": ("attn.to_add_out",),
            "img_mlp.0": ("ff.net.0.proj",),
            "img_mlp.2": ("ff.net.2",),
            "txt_mlp.0": ("ff_context.net.0.proj",),
            "txt_mlp.2": ("ff_context.net.2",),
        },
    ),
    "single_blocks": (
        "single_transformer_blocks",
        {
            "modulation.lin": ("norm.linear",),
            "linear1": ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"),
            "linear2": ("proj_out",),
        },
    ),
}
_IN_BLOCK = re.compile(r"(double_blocks|single_blocks)\.(\d+)\.(.+)")


def diffusers_names(path: str) -> tuple[str, ...]:
    """What diffusers calls the layer at `path` of the transformer, "transformer." in front; () outside blocks."""
    match = _IN_BLOCK.fullmatch(path)
    if match is None:
        return ()
    blocks, layers = _BLOCKS[match[1]]
    return tuple(f"transformer.{blocks}.{match[2]}.{layer}" for layer in layers.get(match[3], ()))
