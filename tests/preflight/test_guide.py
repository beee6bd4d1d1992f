"""A guide's config with its seven traps: each is said before the run, and the run does what its author meant."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flux_train_network import main
from library.models.tiny import ensure_tiny_flux
from tests.e2e.running import draw_pictures
from tests.preflight.dry_runs import advice, dry_run

SIZES = [(96, 64), (64, 96), (80, 80)]
TOKENIZERS = ("--tokenizer_cache_dir", "polyrank/tiny-flux")


def write_fp8(source: Path, target: Path) -> None:
    """The transformer of `source` with the matrices of its blocks in float8, as fp8 checkpoints have them."""
    with safe_open(source, framework="pt") as file:
        metadata = file.metadata()
    tensors = {
        name: tensor.to(torch.float8_e4m3fn) if "blocks." in name and tensor.dim() == 2 else tensor
        for name, tensor in load_file(source).items()
    }
    save_file(tensors, target, metadata)


@pytest.fixture(scope="module")
def guide(tmp_path_factory: pytest.TempPathFactory, repository: Path) -> Path:
    """The guide's file, with tiny models under the names it uses and its folder of captioned pictures."""
    work, tiny = tmp_path_factory.mktemp("guide"), ensure_tiny_flux()
    files = work / "models"
    files.mkdir()
    for name, stored in (("clip_l", "clip_l"), ("t5xxl_fp16", "t5xxl"), ("ae", "ae")):
        os.link(tiny / f"{stored}.safetensors", files / f"{name}.safetensors")
    write_fp8(tiny / "flux.safetensors", files / "flux1-dev-fp8.safetensors")
    pictures = draw_pictures(work / "my_dataset" / "img" / "10_my_character", SIZES)
    for number in range(len(SIZES)):
        (pictures / f"picture{number}.txt").write_text(
            f"mycharcterv1, waves, number {number}\n", encoding="utf-8"
        )
    text = (repository / "tests/data/preflight/guide.toml").read_text(encoding="utf-8")
    config = work / "flux_lora_config.toml"
    config.write_text(text.replace("{files}", str(files)).replace("{work}", str(work)), encoding="utf-8")
    return config


def test_a_dry_run_names_all_seven_traps(guide: Path):
    report = dry_run(guide, *TOKENIZERS)
    said = [notice["text"] for notice in report["notices"]]
    assert any("batch_size is taken as train_batch_size" in text for text in said)
    assert any("has no .caption file but 3 .txt captions; those are used" in text for text in said)
    codes = advice(report)
    assert "flux1-dev-fp8.safetensors is stored in fp8 and fp8_base is off" in codes["fp8-upcast"]
    assert "T5 stays in memory and runs in every step" in codes["text-encoders-loaded"]
    assert "CLIP-L is trained as well" in codes["clip-l-trained"]
    assert "stays at 3.5" in codes["flux-guidance"]
    assert "stays at sigma" in codes["flux-timesteps"]
    assert "stays at sigma_scaled" in codes["flux-prediction"]
    assert "2 of 3 images are cropped" in codes["images-cropped"]
    assert "lose 33% of their area on average, at most 33%" in codes["images-cropped"]
    (folder,) = report["folders"]
    assert folder["example"] == "mycharcterv1, waves, number 0"


def test_heeding_the_advice_silences_it(guide: Path):
    report = dry_run(
        guide, *TOKENIZERS, "--fp8_base", "--cache_text_encoder_outputs", "--network_train_unet_only",
        "--guidance_scale", "1", "--timestep_sampling", "flux_shift", "--model_prediction_type", "raw",
        "--enable_bucket", "--bucket_no_upscale", "--train_batch_size", "1", "--caption_extension", ".txt",
    )  # fmt: skip
    assert advice(report) == {}


def test_the_guide_trains_what_its_author_meant(guide: Path):
    assert main([
        "--config_file", str(guide), *TOKENIZERS, "--resolution", "64", "--max_train_epochs", "1",
        "--max_data_loader_n_workers", "0", "--t5xxl_max_token_length", "80",
    ]) == 0  # fmt: skip
    with safe_open(
        guide.parent / "my_dataset/model/my_character_lora_v1.safetensors", framework="pt"
    ) as file:
        metadata, keys = file.metadata(), set(file.keys())
    tags = json.loads(metadata["ss_tag_frequency"])["10_my_character"]
    assert tags["mycharcterv1"] == 3
    assert metadata["ss_steps"] == "30"
    assert any(key.startswith("lora_te1_") for key in keys), "CLIP-L is trained as Kohya does"
