"""[model] The files of the base model and how they are read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.config.kinds import ModelName
from library.config.options import Limit, option, refused_values


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Base model: transformer, text encoders, autoencoder."""

    pretrained_model_name_or_path: ModelName | None = option(
        None, "FLUX.1 transformer: a .safetensors file, a folder in diffusers layout, or a model name"
    )
    clip_l: ModelName | None = option(None, "CLIP-L text encoder: a .safetensors file")
    t5xxl: ModelName | None = option(None, "T5-XXL text encoder: a .safetensors file")
    ae: ModelName | None = option(None, "autoencoder: a .safetensors file")
    tokenizer_cache_dir: Path | None = option(
        None, "folder with the tokenizers, so that nothing is downloaded"
    )
    t5xxl_max_token_length: int | None = option(
        None,
        "T5 tokens a caption; unset is 512 for dev and 256 for schnell",
        limit=Limit(ge=1, unit="tokens"),
    )
    apply_t5_attn_mask: bool = option(False, "keep padding tokens of T5 out of the attention")
    model_type: str = option(
        "flux",
        "kind of base model",
        choices=("flux", "chroma"),
        effect=refused_values({"chroma": "Chroma models are not supported: this trainer trains FLUX.1 only"}),
    )
    no_half_vae: bool = option(False, "run the autoencoder in float32")
    disable_mmap_load_safetensors: bool = option(
        False, "read model files through ordinary reads instead of memory mapping"
    )
