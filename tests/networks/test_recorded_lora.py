"""A LoRA written by the reference, on the reference's tiny FLUX: the same output, loaded and merged."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from library.config.sections.network import NetworkConfig
from library.models.flux import Flux
from library.models.load import load_flux
from networks.interface import create, merge_base_weights

DATA = Path(__file__).resolve().parent.parent / "data"
LORA = DATA / "networks" / "kohya_lora_tiny.safetensors"


def predict(model: Flux) -> torch.Tensor:
    inputs = load_file(DATA / "models" / "inputs.safetensors")
    names = ("img", "img_ids", "txt", "txt_ids", "timesteps", "y", "guidance")
    with torch.no_grad():
        out: torch.Tensor = model(**{name: inputs[name] for name in names})
    return out


def relative_error(found: torch.Tensor) -> float:
    expected = load_file(DATA / "networks" / "kohya_lora_tiny_outputs.safetensors")["pred"]
    return float((found - expected).abs().max() / expected.abs().max())


def test_loaded_it_gives_the_recorded_output():
    model = load_flux(DATA / "models" / "flux.safetensors")
    assert relative_error(predict(model)) > 0.01, "without the LoRA the output is another"
    config = NetworkConfig(
        network_module="networks.lora_flux",
        network_weights=LORA,
        dim_from_weights=True,
        network_train_unet_only=True,
    )
    handle = create(config, text_encoders=[], transformer=model)
    handle.apply()
    handle.module.eval()
    assert relative_error(predict(model)) < 1e-5


def test_merged_it_gives_the_recorded_output():
    model = load_flux(DATA / "models" / "flux.safetensors")
    config = NetworkConfig(
        network_module="networks.lora_flux", base_weights=(LORA,), network_train_unet_only=True
    )
    merge_base_weights(config, text_encoders=[], transformer=model)
    assert relative_error(predict(model)) < 1e-5
