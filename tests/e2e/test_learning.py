"""What training is for: with the saved file in effect, each caption draws the picture it was trained with.

The whole way is the real one: pictures and captions on disk, `main`, the adapter file read back, FLUX's sampling
loop. The noise that is sampled from comes from seeds that training never used.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from flux_train_network import main
from library.adapters.base import Conditions
from library.adapters.flux import FluxTrainModule, ForwardSettings
from library.adapters.sampling import sample_latents, schedule
from library.config.load import load_config
from library.config.sections.network import NetworkConfig
from library.data.records import TextCond
from library.train.loading import ModelLoader
from library.train.prepare import locate_models
from networks.interface import create
from tests.e2e.running import draw_pictures, write_config

CAPTIONS = ("a red apple", "the deep blue sea", "forest in fog", "city lights at night")
STEPS, RATE = 250, 4e-3
BETTER = 5.0  # times that the error to a picture's latents falls
CPU = torch.device("cpu")


def trained_file(folder: Path) -> tuple[Path, ModelLoader, list[Tensor]]:
    """A LoRA trained on four pictures; the file, the models, and the pictures' latents [1, 16, 8, 8]."""
    pictures = draw_pictures(folder / "data" / "1_scenes", [(64, 64)] * len(CAPTIONS))
    for number, caption in enumerate(CAPTIONS):
        (pictures / f"picture{number}.txt").write_text(caption, encoding="utf-8")
    config = write_config(
        folder / "c.toml", folder / "data", folder / "out",
        max_train_epochs=None, max_train_steps=STEPS, train_batch_size=4, network_dim=32, network_alpha=32,
        learning_rate=RATE, lr_scheduler="cosine", discrete_flow_shift=1.5, cache_latents_to_disk=True,
        t5xxl_max_token_length=16,
    )  # fmt: skip
    arguments = ["--config_file", str(config)]
    assert main(arguments) == 0
    options = load_config(arguments).config
    latents = []
    for number in range(len(CAPTIONS)):
        with np.load(pictures / f"picture{number}_0064x0064_flux.npz") as cache:
            latents.append(torch.from_numpy(cache["latents_8x8"])[None].float())
    return folder / "out" / "out.safetensors", ModelLoader(options, locate_models(options.model)), latents


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Tensor]:
    """Mean square error [caption, picture] of what is sampled, by the file's strength."""
    file, loader, latents = trained_file(tmp_path_factory.mktemp("learning"))
    transformer, encoders = loader.transformer(CPU), loader.text_encoders(CPU)
    settings = NetworkConfig(
        network_module="networks.lora_flux", network_weights=str(file), dim_from_weights=True,
        network_train_unet_only=True,
    )  # fmt: skip
    network = create(settings, text_encoders=[], transformer=transformer)
    network.apply()
    root = FluxTrainModule(
        transformer=transformer, network=network.module, clip_l=None, t5=None,
        settings=ForwardSettings(guidance_scale=1.0, apply_t5_attn_mask=False, autocast_dtype=None),
    ).eval()  # fmt: skip

    def velocity(x_t: Tensor, t: Tensor, guidance: Tensor, text: TextCond) -> Tensor:
        return root(x_t, t, Conditions(text=text, tokens=None), guidance)

    errors: dict[float, Tensor] = {}
    for strength in (0.0, 1.0):
        network.set_multiplier(strength)
        rows = []
        for number, caption in enumerate(CAPTIONS):
            noise = torch.randn(latents[0].shape, generator=torch.Generator().manual_seed(1000 + number))
            x = sample_latents(
                velocity, noise=noise, times=schedule(24, tokens=16, shift=False), text=encoders.encode([caption]),
                negative=None, scale=1.0, guidance=1.0,
            )  # fmt: skip
            rows.append(torch.stack([(x - target).square().mean() for target in latents]))
        errors[strength] = torch.stack(rows)
    return errors


def test_every_picture_is_drawn_much_closer_than_without_the_file(drawn: dict[float, Tensor]):
    without, with_file = drawn[0.0].diagonal(), drawn[1.0].diagonal()
    assert (without > BETTER * with_file).all(), f"without {without.tolist()}, with {with_file.tolist()}"


def test_each_caption_draws_its_own_picture(drawn: dict[float, Tensor]):
    """One mean of all pictures, whatever the caption, would come closer to each of them too."""
    assert drawn[1.0].argmin(dim=1).tolist() == list(range(len(CAPTIONS)))
    others = drawn[1.0] + torch.diag(torch.full((len(CAPTIONS),), float("inf")))
    assert (others.amin(dim=1) > BETTER * drawn[1.0].diagonal()).all(), drawn[1.0].tolist()
