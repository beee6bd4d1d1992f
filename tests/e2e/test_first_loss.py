"""The loss of a run's first step, from pictures on disk through all that weighs it, computed a second time.

At the first step the network adds nothing, so the frozen model's answer is known; noise and noise level are keyed by
the pictures' names. Masks are averaged over each cell of 8x8 pixels, and the mean is over all cells, as in Kohya.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from flux_train_network import main
from library.adapters.base import Conditions
from library.adapters.flux import FluxTrainModule, ForwardSettings
from library.config.load import load_config
from library.flow.noise import draw_noise, draw_uniform
from library.randomness import Visit
from library.train.loading import ModelLoader
from library.train.prepare import locate_models, read_data
from tests.e2e.running import draw_pictures, write_config

PRIOR = 0.3
SEED = 7


def draw_masks(folder: Path, names: list[str]) -> None:
    """Masks whose red channel counts: stripes of every weight; the other channels mislead."""
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        red = (np.arange(64)[None, :] * (number + 3) + np.arange(64)[:, None] * 5) % 256
        mask = np.stack([red, 255 - red, np.zeros_like(red)], axis=-1).astype(np.uint8)
        Image.fromarray(mask).save(folder / name)


def give_alpha(folder: Path) -> None:
    """A soft-edged alpha channel for the first picture; the second keeps none and counts in full."""
    path = folder / "picture0.png"
    alpha = np.clip(np.arange(64)[None, :] * 6 - np.arange(64)[:, None] * 2, 0, 255).astype(np.uint8)
    picture = Image.open(path).convert("RGB")
    picture.putalpha(Image.fromarray(np.broadcast_to(alpha, (64, 64)).copy()))
    picture.save(path)


def cell_weights(picture: Path, masks: Path | None, *, alpha: bool) -> torch.Tensor:  # [8, 8]
    """The mean weight of each cell's pixels."""
    pixels = np.full((64, 64), 255.0)
    if masks is not None:
        pixels = np.asarray(Image.open(masks / picture.name).convert("RGB"), dtype=np.float64)[:, :, 0]
    elif alpha and (image := Image.open(picture)).mode == "RGBA":
        pixels = np.asarray(image, dtype=np.float64)[:, :, 3]
    return torch.from_numpy(pixels.reshape(8, 8, 8, 8).mean(axis=(1, 3)) / 255).float()


@pytest.mark.parametrize("mask", ["none", "picture", "alpha"])
def test_masks_and_prior_weights_enter_the_loss_as_in_the_reference(tmp_path: Path, mask: str):
    train = draw_pictures(tmp_path / "train" / "1_waves", [(64, 64)] * 2)
    draw_pictures(tmp_path / "reg" / "1_sea", [(64, 64)] * 2)
    masks = None
    options: dict[str, object] = {"reg_data_dir": str(tmp_path / "reg"), "prior_loss_weight": PRIOR}
    if mask == "picture":  # a mask for every picture that is trained on
        masks = tmp_path / "masks" / "1_waves"
        draw_masks(masks, ["picture0.png", "picture1.png"])
        options |= {"masked_loss": True, "conditioning_data_dir": str(masks.parent)}
    elif mask == "alpha":
        give_alpha(train)
        options |= {"alpha_mask": True}
    config = write_config(
        tmp_path / "c.toml", tmp_path / "train", tmp_path / "out", train_batch_size=4, max_train_epochs=None,
        max_train_steps=1, t5xxl_max_token_length=16, timestep_sampling="uniform", loss_type="huber",
        huber_schedule="exponential", model_prediction_type="sigma_scaled", weighting_scheme="cosmap",
        cache_latents_to_disk=True, save_state_on_train_end=True, **options,
    )  # fmt: skip
    arguments = ["--config_file", str(config), "--console_log_level", "ERROR"]
    assert main(arguments) == 0
    (logged,) = json.loads((tmp_path / "out" / "out-state" / "train_state.json").read_text())["losses"]

    loaded = load_config(arguments).config
    loader, cpu = ModelLoader(loaded, locate_models(loaded.model)), torch.device("cpu")
    encoders = loader.text_encoders(cpu)
    root = FluxTrainModule(
        transformer=loader.transformer(cpu), network=torch.nn.Module(), clip_l=None, t5=None,
        settings=ForwardSettings(guidance_scale=1.0, apply_t5_attn_mask=False, autocast_dtype=None),
    ).eval()  # fmt: skip
    losses = []
    records = read_data(loaded, seed=SEED, world_size=1).discovered.records
    assert [record.is_reg for record in records] == [False, False, True, True]
    for record in records:
        with np.load(record.path.parent / f"{record.path.stem}_0064x0064_flux.npz") as cache:
            x = torch.from_numpy(cache["latents_8x8"])[None].float()
        visit = Visit(record.key, 0)
        noise, s = draw_noise(SEED, [visit], x.shape[1:]), draw_uniform(SEED, [visit], purpose="timestep")
        x_t = (1 - s) * x + s * noise
        with torch.no_grad():
            answer = root(x_t, s, Conditions(text=encoders.encode([record.caption]), tokens=None))
        difference = (x_t - s * answer) - (noise - x)
        c = 0.1**s
        loss = 2 * c * ((difference.square() + c**2).sqrt() - c) * 2 / (np.pi * (1 - 2 * s + 2 * s**2))
        weights = cell_weights(record.path, None if record.is_reg else masks, alpha=mask == "alpha")
        losses.append((loss * weights).mean() * (PRIOR if record.is_reg else 1.0))
    assert logged == pytest.approx(float(torch.stack(losses).mean()), rel=1e-5)
    assert (weights == 1).all(), "the last picture is one of regularisation, which counts everywhere"
