"""[network] The adapter that is trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.config.options import Limit, option


@dataclass(frozen=True, slots=True, kw_only=True)
class NetworkConfig:
    """Adapter: module, rank, and what it is trained on."""

    network_module: str | None = option(
        None, "module of the adapter, such as networks.lora_flux or lycoris.kohya"
    )
    network_dim: int | None = option(
        None, "rank of the adapter; unset is the module's own default", limit=Limit(ge=1)
    )
    network_alpha: float = option(1.0, "the adapter's output is scaled by network_alpha / network_dim")
    network_dropout: float | None = option(
        None, "share of the adapter's inputs that is dropped in training", limit=Limit(ge=0, le=1)
    )
    network_args: tuple[str, ...] = option((), "further arguments of the module, as key=value")
    network_weights: Path | None = option(None, "adapter file to start from")
    dim_from_weights: bool = option(False, "take the ranks from network_weights")
    base_weights: tuple[Path, ...] = option(
        (), "adapter files that are merged into the base model before training"
    )
    base_weights_multiplier: tuple[float, ...] = option(
        (), "strength of each file of base_weights; unset is 1"
    )
    scale_weight_norms: float | None = option(
        None, "scale weights down whose norm exceeds this; 0 turns it off", limit=Limit(ge=0)
    )
    network_train_unet_only: bool = option(False, "train the transformer's adapter only, no text encoder")
    network_train_text_encoder_only: bool = option(False, "train the text encoders' adapter only")

    @property
    def wants_t5(self) -> bool:
        """Whether network_args ask for T5 to be trained beside CLIP-L."""
        pairs = (argument.partition("=") for argument in self.network_args)
        return any(
            key.strip() == "train_t5xxl" and value.strip().lower() == "true" for key, _, value in pairs
        )
