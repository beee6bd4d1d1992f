"""Pictures and captions cached a second, against what the encoders could do by themselves on the same card.

    python -m tools.bench_cache --json cache.jsonl
    python -m tools.bench_cache --images 400 --vae_batch_size 4

Pictures are real JPEG and PNG files, made on the spot; autoencoder, CLIP-L and T5-XXL are of full size with random
weights. What is measured is the trainer's own caching phase from its survey to the last file on the disk, without
the reading of the encoders. `share` is the encoders' own time, for the same batches with their inputs on the card,
divided by it: 1 would mean that decoding, copying and writing cost nothing. Options that are not the tool's own are
the trainer's.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console

from library.adapters.pictures import image_encoder
from library.adapters.text import FluxTextEncoders
from library.cache.build import posterior_noise
from library.cache.latents import latent_needs
from library.config.load import load_config
from library.config.train_config import TrainConfig
from library.data import images
from library.data.decode import read_picture
from library.data.resize import resize
from library.distributed.base import Backend
from library.log import setup_logging
from library.models.autoencoder import AutoEncoder
from library.train.caching import CAPTION_BATCH, CachingPhase, free_memory
from library.train.prepare import Data, ModelFiles, read_data
from library.train.setup import connected
from tools.bench_models import MODEL_SIZES, RandomEncoders

ORIGINALS = 8  # different pictures; the others are copies of them
WORDS = (
    "old",
    "young",
    "red",
    "blue",
    "small",
    "large",
    "cat",
    "dog",
    "house",
    "tree",
    "river",
    "light",
    "under",
)


def write_pictures(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Upright and lying pictures with some grain, as JPEG and PNG, each with a caption of its own."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for number in range(count):
        suffix = ".png" if number % 4 == 3 else ".jpg"
        path = folder / f"{number:05d}{suffix}"
        if number < ORIGINALS:
            shape = size if number % 2 else size[::-1]
            coarse = rng.integers(0, 256, (24, 24, 3), dtype=np.uint8)
            grain = rng.normal(0, 6, (shape[1], shape[0], 3))
            pixels = resize(coarse, shape, "bicubic") + grain
            picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            picture.save(path, **({"quality": 92} if suffix == ".jpg" else {"compress_level": 4}))
        else:
            shutil.copy(folder / f"{number % ORIGINALS:05d}{suffix}", path)
        words = rng.choice(WORDS, 40)
        path.with_suffix(".txt").write_text(f"picture {number}: {' '.join(words)}", encoding="utf-8")


def best_of(function: Callable[[], object], device: torch.device, *, times: int) -> float:
    """Seconds of one call: the mean of `times` in a row, after two that do not count."""
    for _ in range(2):
        function()
    _wait(device)
    began = time.perf_counter()
    for _ in range(times):
        function()
    _wait(device)
    return (time.perf_counter() - began) / times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Ready(RandomEncoders):
    """Encoders made before the clock starts."""

    def prepare(self) -> None:
        """Make them."""
        self.__dict__["made"] = (super().autoencoder(), super().text_encoders(self.device))

    def autoencoder(self) -> AutoEncoder:
        """The one that is ready."""
        made: AutoEncoder = self.__dict__["made"][0]
        return made

    def text_encoders(self, device: torch.device) -> FluxTextEncoders:
        """Those that are ready."""
        del device
        made: FluxTextEncoders = self.__dict__["made"][1]
        return made


def own_seconds_of_latents(data: Data, loader: Ready, batch_size: int, *, repeats: int) -> float:
    """Seconds the autoencoder alone takes for all pictures, in batches as the phase makes them."""
    autoencoder, device, dtype = loader.autoencoder(), loader.device, loader.autoencoder_dtype
    buckets = [need.placement.bucket for need in latent_needs(data.training)]
    total = 0.0
    for bucket in dict.fromkeys(buckets):
        whole, rest = divmod(buckets.count(bucket), batch_size)
        for size, times in ((batch_size, whole), (rest, 1)):
            if size and times:
                width, height = bucket
                pixels = torch.rand(size, 3, height, width, device=device).to(dtype)
                noise = torch.randn(size, 16, height // 8, width // 8, device=device).to(dtype)
                with torch.no_grad():
                    total += times * best_of(
                        lambda pixels=pixels, noise=noise: autoencoder.encode(pixels, noise),  # type: ignore[misc]
                        device, times=min(times, repeats),
                    )  # fmt: skip
    return total


def own_seconds_of_text(captions: Sequence[str], loader: Ready, batch_size: int, *, repeats: int) -> float:
    """Seconds that tokenizers and encoders alone take for all captions, in batches as the phase makes them."""
    encoders = loader.text_encoders(loader.device)
    chunk = list(captions[:batch_size])
    return len(captions) / len(chunk) * best_of(lambda: encoders.encode(chunk), loader.device, times=repeats)


def decoding_seconds(data: Data) -> float:
    """Seconds to read, scale and convert one picture in one thread, its noise included."""
    needs = latent_needs(data.training)[:ORIGINALS]
    began = time.perf_counter()
    for need in needs:
        picture = read_picture(need.record.path)
        images.image_tensor(images.render(picture.rgb, images.frame(need.placement), need.interpolation))
        posterior_noise(need, "posterior")
    return (time.perf_counter() - began) / len(needs)


def faster_autoencoders(loader: Ready, bucket: tuple[int, int], *, repeats: int) -> dict[str, float]:
    """Seconds of one picture with other settings of the same arithmetic, to see whether it could be faster."""
    autoencoder, device, dtype = loader.autoencoder(), loader.device, loader.autoencoder_dtype
    encode = image_encoder(autoencoder, device)
    pixels = torch.rand(1, 3, bucket[1], bucket[0], device=device).to(dtype)
    found = {"as it is": best_of(lambda: encode(pixels, None), device, times=repeats)}
    before = torch.backends.cudnn.benchmark
    torch.backends.cudnn.benchmark = True
    found["cudnn.benchmark"] = best_of(lambda: encode(pixels, None), device, times=repeats)
    autoencoder.to(memory_format=torch.channels_last)
    wide = pixels.to(memory_format=torch.channels_last)
    found["both"] = best_of(lambda: encode(wide, None), device, times=repeats)
    torch.backends.cudnn.benchmark = before
    found["channels_last"] = best_of(lambda: encode(wide, None), device, times=repeats)
    return {name: round(seconds, 5) for name, seconds in found.items()}


def measure(config: TrainConfig, backend: Backend, arguments: argparse.Namespace) -> dict[str, Any]:
    """Both passes; files are made and removed with the folder that the config names."""
    device = backend.world.device
    data = read_data(config, seed=0, world_size=1)
    nowhere = Path("random")
    files = ModelFiles(nowhere, nowhere, nowhere, nowhere, None, {})
    loader = Ready(config, files, MODEL_SIZES[arguments.size], device)
    loader.prepare()
    phase = CachingPhase(config=config, loader=loader, backend=backend, console=Console(stderr=True))
    result: dict[str, Any] = {
        "options": arguments.given,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "cores": os.cpu_count(),
        "seconds_decode_one_thread": round(decoding_seconds(data), 4),
    }
    caching, count = config.caching, len(data.training.records)
    own = own_seconds_of_latents(data, loader, caching.vae_batch_size, repeats=arguments.repeats)
    began = time.perf_counter()
    phase.latents(data)
    result["latents"] = _compared(count, time.perf_counter() - began, own)
    captions = [record.caption for record in data.training.records]
    batch_size = caching.text_encoder_batch_size or CAPTION_BATCH
    own = own_seconds_of_text(captions, loader, batch_size, repeats=arguments.repeats)
    free_memory()
    began = time.perf_counter()
    phase.text(data, ())
    result["text"] = _compared(count, time.perf_counter() - began, own)
    if device.type == "cuda":
        bucket = data.training.placements[0].bucket
        result["autoencoder_seconds"] = faster_autoencoders(loader, bucket, repeats=arguments.repeats)
    return result


def _compared(count: int, seconds: float, own: float) -> dict[str, float]:
    return {
        "count": count,
        "seconds": round(seconds, 3),
        "per_second": round(count / seconds, 2),
        "encoders_alone_per_second": round(count / own, 2),
        "share": round(own / seconds, 4),
    }


def parse(argv: Sequence[str], folder: Path) -> tuple[argparse.Namespace, TrainConfig]:
    """The tool's own options, and the trainer's over the pictures in `folder`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=MODEL_SIZES, default="dev", help="size of the encoders")
    parser.add_argument("--images", type=int, default=200, help="pictures and captions")
    parser.add_argument("--picture", default="1536x1152", metavar="WxH", help="size of half of the pictures")
    parser.add_argument(
        "--repeats", type=int, default=20, help="calls that the encoders' own rate is the mean of"
    )
    parser.add_argument("--json", metavar="FILE", help="append the result as one line of JSON")
    own, rest = parser.parse_known_args(argv)
    own.given = list(argv)
    defaults = {
        "pretrained_model_name_or_path": "polyrank/tiny-flux", "train_data_dir": str(folder / "pictures"),
        "output_dir": str(folder / "output"), "network_module": "networks.lora_flux", "caption_extension": ".txt",
        "resolution": "1024,1024", "mixed_precision": "bf16", "max_train_steps": "10", "guidance_scale": "1.0",
    }  # fmt: skip
    flags = [
        "--enable_bucket", "--cache_latents", "--cache_latents_to_disk", "--cache_text_encoder_outputs",
        "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only",
    ]  # fmt: skip
    words = [
        word for name, value in defaults.items() if f"--{name}" not in rest for word in (f"--{name}", value)
    ]
    return own, load_config([*words, *flags, *rest]).config


def main(argv: Sequence[str] | None = None) -> int:
    """Make the pictures, run the measurement, print it."""
    with tempfile.TemporaryDirectory(prefix="bench-cache-") as name:
        own, config = parse(sys.argv[1:] if argv is None else argv, Path(name))
        setup_logging(is_main=True, console=Console(stderr=True), simple=True)
        width, height = (int(side) for side in own.picture.split("x"))
        write_pictures(Path(name) / "pictures" / "1_random", own.images, (width, height))
        with connected(config) as backend:
            result = measure(config, backend, own)
    print(json.dumps(result))
    if own.json:
        with Path(own.json).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
