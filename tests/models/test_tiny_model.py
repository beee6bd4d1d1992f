"""The embedded model: the same bytes everywhere, loadable, and of use."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageDraw

from library.flow.path import image_ids, pack
from library.models import tiny
from library.models.load import load_autoencoder, load_clip_l, load_flux, load_t5
from library.models.locate import locate
from library.models.tokenizers import FluxTokenizers

ROOT = Path(__file__).parents[2]

# SHA-256 of each file. A change here is a new model: raise the number in `tiny.FOLDER`.
GOLDEN = {
    "ae.safetensors": "236c922c4feb6a19",
    "clip_l.safetensors": "4676321dabce80c7",
    "flux.safetensors": "6b1d27ca6afd7a30",
    "t5xxl.safetensors": "f22ff63fea4fbc3f",
    "tokenizers/google_t5-v1_1-xxl/tokenizer.json": "4c848e75e07f9f8b",
    "tokenizers/google_t5-v1_1-xxl/tokenizer_config.json": "d3db5968ab7c47eb",
    "tokenizers/openai_clip-vit-large-patch14/merges.txt": "215a6aba00d27bcd",
    "tokenizers/openai_clip-vit-large-patch14/special_tokens_map.json": "8f10c4354c8e5578",
    "tokenizers/openai_clip-vit-large-patch14/tokenizer_config.json": "31897a10661342d1",
    "tokenizers/openai_clip-vit-large-patch14/vocab.json": "54a5caf2ae3ab8e7",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    target = tmp_path_factory.mktemp("tiny")
    tiny.write_tiny_flux(target)
    return target


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest()[:16] for f in files}


def test_bytes_are_the_same_everywhere(folder):
    assert digests(folder) == GOLDEN


def test_name_resolves_into_the_cache_even_when_ranks_start_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path))
    with ThreadPoolExecutor(3) as pool:
        paths = list(pool.map(lambda _: locate(tiny.NAME, "ae", "ae"), range(3)))
    assert paths == [tmp_path / tiny.FOLDER / "ae.safetensors"] * 3
    assert digests(tmp_path / tiny.FOLDER) == GOLDEN
    assert locate(tiny.NAME, "tokenizers", "x").is_dir()
    kept = locate(tiny.NAME, "flux", "x").stat()
    locate(tiny.NAME, "clip_l", "x").unlink()
    assert locate(tiny.NAME, "clip_l", "x").is_file()
    assert locate(tiny.NAME, "flux", "x").stat().st_mtime_ns == kept.st_mtime_ns


def test_tool_writes_the_same_files(tmp_path):
    command = [sys.executable, str(ROOT / "tools" / "make_tiny_flux.py"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert "flux.safetensors" in done.stdout
    assert digests(tmp_path / "out") == GOLDEN


def test_captions_to_velocity_is_of_order_one(folder):
    tokens = FluxTokenizers.load(folder / "tokenizers", t5_length=32).tokenize(["a red house", "a dog", ""])
    pooled = load_clip_l(folder / "clip_l.safetensors", dtype=torch.float32)(tokens.clip)
    hidden = load_t5(folder / "t5xxl.safetensors", dtype=torch.float32)(tokens.t5)
    assert 0.5 < pooled.std() < 2
    assert 0.5 < hidden.std() < 2
    assert (pooled[0] - pooled[1]).abs().mean() > 0.1
    model = load_flux(folder / "flux.safetensors", dtype=torch.float32)
    assert model.params == tiny.FLUX_PARAMS
    img = torch.randn(3, 16, 64, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(3, 16, 3)
    out = model(img, ids, hidden, torch.zeros(3, 32, 3), torch.rand(3), pooled, torch.ones(3))
    assert 0.2 < out.std() < 2
    other = model(
        img, ids, hidden.flip(0), torch.zeros(3, 32, 3), torch.full((3,), 0.5), pooled.flip(0), torch.ones(3)
    )
    assert (out - other).abs().mean() > 0.01


@torch.no_grad()
def test_transformer_denoises_before_any_training(folder):
    source = torch.Generator().manual_seed(0)
    coarse = torch.rand(8, 3, 4, 4, generator=source) * 2 - 1
    images = torch.nn.functional.interpolate(coarse, (128, 128), mode="bicubic").clamp(-1, 1)
    latents = load_autoencoder(folder / "ae.safetensors").encode(images)
    noise = torch.randn(latents.shape, generator=source)
    model = load_flux(folder / "flux.safetensors", dtype=torch.float32)
    for time in (0.2, 0.4, 0.6, 0.8):
        mixed = (1 - time) * latents + time * noise
        velocity = model(
            pack(mixed),
            image_ids(8, height=16, width=16),
            torch.zeros(8, 16, 64),
            torch.zeros(8, 16, 3),
            torch.full((8,), time),
            torch.zeros(8, 64),
            torch.ones(8),
        )
        wanted = pack(noise - latents)
        assert (velocity - wanted).square().mean() < 0.8 * wanted.square().mean(), time


def picture() -> torch.Tensor:
    """A scene of a lawn, a sky that brightens, a house and a sun, [1, 3, 128, 192] in -1..1."""
    image = Image.new("RGB", (192, 128), (90, 150, 60))
    draw = ImageDraw.Draw(image)
    for row in range(70):
        draw.line((0, row, 192, row), fill=(90 + row, 140 + row, 230))
    draw.rectangle((40, 50, 110, 105), fill=(200, 90, 60))
    draw.polygon(((30, 52), (120, 52), (75, 22)), fill=(90, 50, 40))
    draw.ellipse((140, 12, 170, 42), fill=(250, 230, 90))
    data = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).reshape(128, 192, 3)
    return data.permute(2, 0, 1)[None].float() / 127.5 - 1


def peak_ratio(a: torch.Tensor, b: torch.Tensor) -> float:
    return (10 * torch.log10(4 / (a - b).square().mean())).item()


@torch.no_grad()
def test_autoencoder_reconstructs(folder):
    model = load_autoencoder(folder / "ae.safetensors")
    image = picture()
    latents = model.encode(image)
    assert latents.shape == (1, 16, 16, 24)
    assert 0.3 < latents.std() < 3
    noisy = model.encode(image, torch.randn(latents.shape))
    assert 0 < (noisy - latents).abs().max() < 0.1
    back = model.decode(latents)
    blocks = torch.nn.functional.avg_pool2d(image, 8).repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert peak_ratio(back, image) > peak_ratio(blocks, image) > 15
    inside = (slice(None), slice(None), slice(8, -8), slice(8, -8))
    assert peak_ratio(back[inside], image[inside]) > 21
    narrow = model.to(torch.bfloat16).decode(latents.bfloat16()).float()
    assert peak_ratio(narrow, image) > peak_ratio(back, image) - 0.5
