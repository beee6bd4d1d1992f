"""Seconds from the start of the process to the first step, with warm caches, at the size of FLUX.1-dev.

    python -m tools.bench_start --folder /tmp/start --json start.jsonl
    python -m tools.bench_start --folder /tmp/start --only "compiled"

A file of 23.8 GB of random weights, pictures and their caches are written into the folder once (--size small takes a
fifth). Then the trainer is started as a user starts it, each time in a process of its own that is ended at its first
step. The folder has its own POLYRANK_CACHE, so the first run of a kind finds nothing compiled and no kernel tried.
The timeline is the trainer's own line; `seconds` is counted from outside, with the interpreter's start. Options that
are not the tool's own are the trainer's.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from library.cache import latents, text
from library.cache.latents import LatentEntry, latent_needs
from library.config.load import load_config
from library.config.train_config import TrainConfig
from library.data.readers import CachedText
from library.distributed.launch import choose_device
from library.errors import ConfigError
from library.models import tiny
from library.models.flux import Flux
from library.models.params import FluxParams
from library.train.caching import planned_text
from library.train.loading import ModelLoader
from library.train.prepare import locate_models, read_data
from tools.bench_models import write_random_flux

ROOT = Path(__file__).resolve().parents[1]
SIZES = {"dev": FluxParams(), "small": FluxParams(depth=4, depth_single_blocks=8), "tiny": tiny.FLUX_PARAMS}
PICTURES = 25
# Name to (options, whether the weights' file is dropped from memory before): in this order, each finds what the ones
# before it left behind.
RUNS: Mapping[str, tuple[str, bool]] = {
    "eager, first": ("--compile_blocks off", False),
    "eager": ("--compile_blocks off", False),
    "compiled, first": ("--compile_blocks on", False),
    "compiled": ("--compile_blocks on", False),
    "compiled, fp8, first": ("--compile_blocks on --base_compute fp8", False),
    "compiled, fp8": ("--compile_blocks on --base_compute fp8", False),
    "eager, file not in memory": ("--compile_blocks off", True),
}


def prepare_folder(folder: Path, size: str, rest: Sequence[str]) -> tuple[str, ...]:
    """Write what a start needs, as far as it is not there. Returns the trainer's options."""
    weights = folder / f"flux-{size}.safetensors"
    pictures = folder / "pictures" / "1_random"
    side = 64 if size == "tiny" else 1024
    small = folder / "small"  # models whose outputs are cached: only their headers are read
    tiny.write_tiny_flux(small)
    options = {
        "pretrained_model_name_or_path": str(weights), "ae": str(small / "ae.safetensors"),
        "clip_l": str(small / "clip_l.safetensors"), "t5xxl": str(small / "t5xxl.safetensors"),
        "tokenizer_cache_dir": str(small / "tokenizers"), "train_data_dir": str(folder / "pictures"),
        "output_dir": str(folder / "output"), "network_module": "networks.lora_flux", "network_dim": "16",
        "network_alpha": "16", "learning_rate": "1e-4", "resolution": f"{side},{side}", "mixed_precision": "bf16",
        "max_train_steps": "1000", "guidance_scale": "1.0", "timestep_sampling": "shift", "seed": "1",
        "discrete_flow_shift": "3.1582", "model_prediction_type": "raw", "caption_extension": ".txt",
        "max_data_loader_n_workers": "2", "t5xxl_max_token_length": "512",
    }  # fmt: skip
    flags = (
        "--cache_latents", "--cache_latents_to_disk", "--cache_text_encoder_outputs",
        "--cache_text_encoder_outputs_to_disk", "--network_train_unet_only",
    )  # fmt: skip
    given = [
        word for name, value in options.items() if f"--{name}" not in rest for word in (f"--{name}", value)
    ]
    words = (*given, *flags, *rest)
    if not weights.exists():
        params = SIZES[size]
        needed = weight_bytes(params)
        free = shutil.disk_usage(folder).free
        if free < 1.05 * needed:
            raise ConfigError(
                f"{folder} has {free / 1e9:.0f} GB left and the weights need {needed / 1e9:.0f} GB: give another "
                "--folder or --size small"
            )
        write_random_flux(weights, params, device=choose_device(0))
    if not pictures.exists():
        pictures.mkdir(parents=True)
        for number in range(PICTURES):
            shade = np.full((side, side, 3), 8 * number, dtype=np.uint8)
            Image.fromarray(shade).save(pictures / f"{number}.png")
            (pictures / f"{number}.txt").write_text(f"shade {number}", encoding="utf-8")
    write_caches(load_config(list(words)).config, SIZES[size])
    return words


def weight_bytes(params: FluxParams) -> int:
    """Size of a transformer in bfloat16."""
    with torch.device("meta"):
        return 2 * sum(tensor.numel() for tensor in Flux(params).state_dict().values())


def write_caches(config: TrainConfig, params: FluxParams) -> None:
    """Random latents and text outputs of all pictures, in files that the trainer finds valid."""
    data = read_data(config, seed=config.training.seed or 0, world_size=1)
    loader = ModelLoader(config, locate_models(config.model))
    generator = torch.Generator().manual_seed(0)
    for need in latent_needs(data.training):
        width, height = need.placement.bucket
        entry = LatentEntry(torch.randn(16, height // 8, width // 8, generator=generator), None, None)
        if not need.path.exists():
            latents.write_entries([(need, entry)], encoder=loader.autoencoder_identity())
    length = loader.t5_length
    cached = CachedText(
        torch.randn(params.vec_in_dim, generator=generator),
        torch.randn(length, params.context_in_dim, generator=generator),
        torch.ones(length, dtype=torch.long),
    )
    for wanted in planned_text(config, data)[0]:
        if not wanted.path.exists():
            text.write_file(wanted, [cached] * len(wanted.captions), options=loader.text_options())


def start(words: Sequence[str], *, cache: Path, limit: float) -> dict[str, Any]:
    """Start the trainer and end it at its first step: what it said of its start, or `failed`."""
    command = [sys.executable, str(ROOT / "flux_train_network.py"), *words]
    environment = {**os.environ, "POLYRANK_CACHE": str(cache)}
    environment.pop("TORCHINDUCTOR_CACHE_DIR", None)
    began = time.perf_counter()
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, cwd=ROOT, env=environment,
        start_new_session=True,
    )  # fmt: skip
    watchdog = threading.Timer(limit, _end, [process])
    watchdog.start()
    said: list[str] = []
    found: dict[str, Any] = {}
    assert process.stderr is not None
    for line in process.stderr:
        said.append(line.rstrip())
        timeline = re.search(r"started in (?P<all>[\d.]+) s(: (?P<parts>.*))?$", line.rstrip())
        if timeline is not None:
            parts = (timeline["parts"] or "").split(", ")
            phases = (part.rpartition(" ") for part in parts if part)
            found = {
                "seconds": round(time.perf_counter() - began, 2),
                "seconds_own": float(timeline["all"]),
                "timeline": {name: float(taken) for name, _, taken in phases},
            }
            break
    watchdog.cancel()
    _end(process)
    process.wait()
    kept = [line for line in said if re.search("attention:|base_compute:|compiled|memory", line)]
    if not found:
        return {"failed": said[-1] if said else "no output", "stderr": said[-30:]}
    return {**found, "said": kept}


def _end(process: subprocess.Popen[str]) -> None:
    """With the processes it started, which are in a session of their own."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def forget(file: Path) -> None:
    """Have the system drop a file from memory, so that it is read from the disk again."""
    with file.open("rb") as opened:
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare the folder, start the trainer a few times; 1 if one of the starts failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--folder", type=Path, required=True, help="weights, pictures, caches; kept")
    parser.add_argument("--size", choices=SIZES, default="dev", help="size of the transformer")
    parser.add_argument("--only", metavar="PATTERN", help="runs whose name matches")
    parser.add_argument("--limit", type=float, default=150, metavar="SECONDS", help="of one run")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append each result as one line of JSON")
    own, rest = parser.parse_known_args(argv)
    own.folder.mkdir(parents=True, exist_ok=True)
    try:
        words = prepare_folder(own.folder.resolve(), own.size, rest)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    failed = 0
    for name, (options, cold) in RUNS.items():
        if own.only is not None and not re.search(own.only, name):
            continue
        if cold:
            forget(own.folder / f"flux-{own.size}.safetensors")
        result = start([*words, *options.split()], cache=own.folder.resolve() / "user-cache", limit=own.limit)
        result = {"run": name, "size": own.size, **result}
        failed += "failed" in result
        print(json.dumps(result), flush=True)
        if own.json is not None:
            with own.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps(result) + "\n")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
