"""Putting the network of a file on a model for a while, and taking it off again as if it had never been there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from networks import weights
from networks.interface import FLUX_MODULE, NetworkHandle, create, module_of

if TYPE_CHECKING:
    from library.config.sections.network import NetworkConfig

_TEXT = "lora_te"


def changes_text(file: Path) -> bool:
    """Whether the adapter `file` has layers in a text encoder."""
    return any(key.startswith(_TEXT) for key in weights.read(file))


def changes_transformer(file: Path) -> bool:
    """Whether the adapter `file` has layers in the transformer."""
    return any(not key.startswith(_TEXT) for key in weights.read(file))


@contextmanager
def worn(
    file: Path,
    config: NetworkConfig,
    *,
    transformer: nn.Module,
    text_encoders: Sequence[nn.Module],
    on_text: bool,
) -> Iterator[NetworkHandle]:
    """The network that `file` holds, in effect on the text encoders if `on_text`, else on the transformer.

    `config` says which module reads it; LyCORIS is taken for what only it knows. Whatever is not worn by may be on
    the meta device. On leaving, both models are as they were.
    """
    config = replace(config, network_module=config.network_module or FLUX_MODULE)
    wanted = replace(
        config, network_module=module_of(config, file), network_weights=file, dim_from_weights=True, network_args=(),
        network_train_unet_only=not on_text, network_train_text_encoder_only=on_text,
    )  # fmt: skip
    encoders = list(text_encoders) if on_text else []
    layers = [layer for model in (transformer, *encoders) for layer in model.modules()]
    before = [(dict(vars(layer)), dict(layer._parameters)) for layer in layers]
    try:
        handle = create(wanted, text_encoders=encoders, transformer=transformer)
        handle.apply()
        handle.module.to(_device(encoders[0] if on_text else transformer))
        handle.module.eval()
        yield handle
    finally:
        for layer, (attributes, parameters) in zip(layers, before, strict=True):
            for name in vars(layer).keys() - attributes.keys():
                delattr(layer, name)
            vars(layer).update({name: value for name, value in attributes.items() if name == "forward"})
            layer._parameters.update(parameters)


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device
