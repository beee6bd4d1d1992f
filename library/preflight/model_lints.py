"""Advice on the models and the network: precision, memory, strength."""

from __future__ import annotations

from library.data.captions import varies
from library.preflight.evidence import Evidence
from library.preflight.words import size_text
from library.train.prepare import trains_text

SMALL_SCALE = 0.1  # alpha / dim below which a LoRA learns far more slowly than recipes assume
LARGE = 10**9  # parameters; below it the precision of a base model does not matter


def fp8_stays_fp8(evidence: Evidence) -> None:
    """An fp8 file is no smaller in memory unless fp8_base keeps it in 8 bits."""
    part, context = evidence.files.parts["flux"], evidence.context
    stored = [part.info(name) for name in part.tensors]
    eight = sum(info.dtype.startswith("F8_") for info in stored)
    memory = context.config.memory
    if not eight or memory.fp8_base or memory.base_compute != "bf16":
        return
    precision = context.config.training.mixed_precision
    width = 4 if precision == "no" else 2
    size = evidence.forecast.trained.base_parameters * width
    context.advise(
        "fp8-upcast",
        f"{evidence.files.transformer.name} is stored in fp8 and fp8_base is off: its weights are cast up and take "
        f"{size_text(size)}; recommended: fp8_base = true, which keeps them in 8 bits",
    )


def precision_suits_the_size(evidence: Evidence) -> None:
    """Kohya's default computes in float32, unless accelerate was told otherwise."""
    context, parameters = evidence.context, evidence.forecast.trained.base_parameters
    if context.config.training.mixed_precision == "no" and parameters > LARGE:
        context.advise(
            "flux-precision",
            f"{context.said('mixed_precision')}: the transformer's weights are kept in float32 and take "
            f"{size_text(parameters * 4)}; recommended: bf16",
        )


def text_encoders_can_go(evidence: Evidence) -> None:
    """Without cached outputs both encoders stay loaded, which only changing captions and T5 training need."""
    context = evidence.context
    changing = any(varies(subset) for dataset in evidence.data.datasets for subset in dataset.subsets)
    if context.config.caching.cache_text_encoder_outputs or changing or context.config.network.wants_t5:
        return
    who = (
        "T5 stays in memory and runs"
        if trains_text(context.config)
        else "T5 and CLIP-L stay in memory and run"
    )
    context.advise(
        "text-encoders-loaded",
        f"cache_text_encoder_outputs is off: {who} in every step although captions do not change; "
        "recommended: cache_text_encoder_outputs = true",
    )


def schnell_is_meant(evidence: Evidence) -> None:
    """schnell is distilled: training it is another matter than training dev."""
    if not evidence.files.is_dev:
        evidence.context.advise(
            "schnell-base",
            f"{evidence.files.transformer.name} is FLUX.1 schnell: distilled to few steps, it takes no guidance, and "
            "LoRAs come out weaker; recommended: train on dev",
        )


def network_scale_is_meant(evidence: Evidence) -> None:
    """alpha / dim scales what the network adds; the default alpha of 1 was made for a small dim."""
    context = evidence.context
    network = context.config.network
    if network.dim_from_weights:
        return
    if network.network_dim is None:
        context.advise(
            "network-dim-default",
            "network_dim is not given, so the module's own default holds (4 for networks.lora_flux): little room to "
            "learn; recommended: 16 or 32",
        )
    elif network.network_alpha and network.network_alpha / network.network_dim < SMALL_SCALE:
        scale = network.network_alpha / network.network_dim
        place = context.sources.get("network_alpha", "default")
        context.advise(
            "network-alpha",
            f"network_alpha = {network.network_alpha:g} ({place}) with network_dim = {network.network_dim}: what is "
            f"learnt is scaled by {scale:g}, so learning is slow; recommended: alpha = dim or dim / 2",
        )


MODEL_LINTS = (
    fp8_stays_fp8,
    precision_suits_the_size,
    text_encoders_can_go,
    schnell_is_meant,
    network_scale_is_meant,
)
