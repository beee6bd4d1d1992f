"""Measure how long a dry run takes to look at a large data set, and how much memory: first time and again.

    python tools/bench_scan.py --images 100000

Pictures, captions, config and cache are made in a temporary folder. The pictures have whole headers of many sizes but
the pixels of 16 x 16, since a dry run reads no pixels. Before the cold run the pages of all files are dropped from
the system's cache where it lets us (the folders' own entries stay).
"""

from __future__ import annotations

import argparse
import io
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import toml
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
TINY = "polyrank/tiny-flux"
REPEATS = (1, 2, 3, 5)
WORDS = (
    *(
        "portrait",
        "long hair",
        "short hair",
        "smile",
        "looking at viewer",
        "outdoors",
        "night",
        "rain",
        "street",
    ),
    *("forest", "city", "blue sky", "hat", "glasses", "red dress", "black jacket", "standing", "running"),
    *("from above", "close-up", "film grain", "masterpiece"),
)


@dataclass(frozen=True, slots=True)
class Measured:
    """One run of the command."""

    seconds: float
    cpu_seconds: float  # what it would take at least on a quiet machine with one core
    peak_mib: float  # resident memory
    output: str


def sized_png(width: int, height: int, *, small: bytes) -> bytes:
    """A PNG whose header says width x height."""
    header = b"IHDR" + struct.pack(">II", width, height) + small[24:29]
    return small[:12] + header + struct.pack(">I", zlib.crc32(header)) + small[33:]


def sized_jpeg(width: int, height: int, *, small: bytes) -> bytes:
    """A JPEG whose frame header says width x height."""
    frame = small.index(b"\xff\xc0")
    return small[: frame + 5] + struct.pack(">HH", height, width) + small[frame + 9 :]


def pictures(count: int, *, seed: int) -> Iterator[tuple[str, bytes, tuple[int, int]]]:
    """Suffix, content and size of each picture: half PNG, half JPEG, sides of 300 to 3000 pixels."""
    rng = random.Random(seed)
    makers: list[tuple[str, bytes, Callable[..., bytes]]] = []
    for suffix, name, make in ((".png", "PNG", sized_png), (".jpg", "JPEG", sized_jpeg)):
        buffer = io.BytesIO()
        Image.effect_noise((16, 16), 60).convert("RGB").save(buffer, name)
        makers.append((suffix, buffer.getvalue(), make))
    for number in range(count):
        suffix, small, make = makers[number % 2]
        size = (rng.randint(300, 3000), rng.randint(300, 3000))
        yield suffix, make(*size, small=small), size


def write_tree(root: Path, count: int, *, seed: int = 0) -> dict[str, tuple[int, int]]:
    """Folders N_name with `count` captioned pictures in all. Returns the sizes by path below `root`."""
    rng = random.Random(seed)
    folders = [f"{repeats}_subject{repeats}" for repeats in REPEATS]
    for folder in folders:
        (root / folder).mkdir(parents=True)
    sizes = {}
    for number, (suffix, content, size) in enumerate(pictures(count, seed=seed)):
        stem = f"{folders[number % len(folders)]}/picture{number:07d}"
        (root / (stem + suffix)).write_bytes(content)
        (root / f"{stem}.txt").write_text(", ".join(rng.sample(WORDS, 12)) + f", number {number}")
        sizes[stem + suffix] = size
    return sizes


def write_config(path: Path, data: Path, *, cache_info: bool = False) -> Path:
    """A config over `data` with the embedded tiny model."""
    values = {
        "pretrained_model_name_or_path": TINY, "clip_l": TINY, "t5xxl": TINY, "ae": TINY,
        "tokenizer_cache_dir": TINY, "train_data_dir": str(data), "caption_extension": ".txt",
        "network_module": "networks.lora_flux", "network_train_unet_only": True, "resolution": "1024,1024",
        "enable_bucket": True, "max_bucket_reso": 2048, "train_batch_size": 2, "cache_latents": True,
        "cache_text_encoder_outputs": True, "max_train_epochs": 1, "output_dir": str(path.parent / "out"),
        "output_name": "bench", "cache_info": cache_info,
    }  # fmt: skip
    path.write_text(toml.dumps(values), encoding="utf-8")
    return path


def forget_pages(root: Path) -> None:
    """Ask the system to drop what it holds of the files below `root`."""
    os.sync()
    for path in root.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def dry_run(config: Path, cache: Path) -> Measured:
    """Run the real command in a process of its own."""
    command = [sys.executable, str(ROOT / "flux_train_network.py"), "--config_file", str(config), "--dry_run"]
    with tempfile.TemporaryFile("w+") as log:
        start = time.perf_counter()
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, "POLYRANK_CACHE": str(cache)}
        )
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        log.seek(0)
        output = log.read()
    if process.returncode:
        raise SystemExit(f"the dry run ended with exit code {process.returncode}:\n{output[-3000:]}")
    return Measured(seconds, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024, output)


def main() -> None:
    """Command line: how many pictures; prints seconds and peak memory of an empty, a cold and a warm run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000, help="pictures in the data set")
    parser.add_argument("--cache_info", action="store_true", help="keep the sizes in the image folders")
    parser.add_argument("--show", action="store_true", help="print the report of the warm run")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="bench_scan_") as name:
        root = Path(name)
        write_tree(root / "few", len(REPEATS))
        few = write_config(root / "few.toml", root / "few")
        dry_run(few, root / "cache")  # makes the tiny model
        print(f"{'images':>8} {'run':>8} {'seconds':>8} {'CPU s':>8} {'peak MiB':>9}")
        _row(len(REPEATS), "warm", dry_run(few, root / "cache"))
        write_tree(root / "data", options.images)
        config = write_config(root / "data.toml", root / "data", cache_info=options.cache_info)
        forget_pages(root / "data")
        _row(options.images, "cold", dry_run(config, root / "cache"))
        warm = dry_run(config, root / "cache")
        _row(options.images, "warm", warm)
        if options.show:
            print(warm.output)


def _row(count: int, run: str, measured: Measured) -> None:
    print(
        f"{count:>8} {run:>8} {measured.seconds:>8.2f} {measured.cpu_seconds:>8.2f} {measured.peak_mib:>9.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
