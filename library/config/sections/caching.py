"""[caching] Latents and text encoder outputs that are computed once."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.options import Limit, option


@dataclass(frozen=True, slots=True, kw_only=True)
class CachingConfig:
    """Caches of latents and of text encoder outputs."""

    cache_latents: bool = option(False, "encode the images once, before training")
    cache_latents_to_disk: bool = option(False, "keep the latents beside the images; implies cache_latents")
    vae_batch_size: int = option(
        1, "images encoded at once while caching", limit=Limit(ge=1, unit="images"), unset=(0,)
    )
    cache_text_encoder_outputs: bool = option(False, "encode the captions once, before training")
    cache_text_encoder_outputs_to_disk: bool = option(
        False, "keep the outputs beside the images; implies cache_text_encoder_outputs"
    )
    text_cache_variants: int = option(
        8,
        "captions of an image that are encoded where they change from visit to visit (shuffle_caption, wildcards "
        "and the like); with as many as an image has visits, training is as without the cache",
        limit=Limit(ge=1, le=256, unit="captions"),
        ours=True,
    )
    text_encoder_batch_size: int | None = option(
        None,
        "captions encoded at once; unset is 16",
        limit=Limit(ge=1, unit="captions"),
        unset=(0,),
    )
    skip_cache_check: bool = option(False, "trust cache files that exist without opening them")
