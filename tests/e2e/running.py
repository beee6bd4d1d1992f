"""Whole runs for tests: a small dataset of drawn pictures, a config over it, and the trainer's own main."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import toml
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent.parent
TINY = "polyrank/tiny-flux"


def draw_pictures(folder: Path, sizes: Sequence[tuple[int, int]], *, captions: bool = True) -> Path:
    """Smooth colourful pictures of the given sizes, each with a caption."""
    folder.mkdir(parents=True)
    for number, (width, height) in enumerate(sizes):
        x, y = np.meshgrid(np.linspace(0, 3, width), np.linspace(0, 3, height))
        waves = [np.sin(x * (number % 3 + 1) + channel) * np.cos(y + number) for channel in range(3)]
        pixels = (np.stack(waves, axis=-1) * 127 + 128).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"picture{number}.png")
        if captions:
            (folder / f"picture{number}.txt").write_text(f"waves, number {number}", encoding="utf-8")
    return folder


def write_config(path: Path, data: Path, output: Path, **changes: object) -> Path:
    """A config of Kohya keys over `data`; None in `changes` takes a key out."""
    values: dict[str, object] = {
        "pretrained_model_name_or_path": TINY, "clip_l": TINY, "t5xxl": TINY, "ae": TINY,
        "tokenizer_cache_dir": TINY, "train_data_dir": str(data), "caption_extension": ".txt",
        "network_module": "networks.lora_flux", "network_dim": 4, "network_alpha": 4,
        "network_train_unet_only": True, "resolution": "64,64", "enable_bucket": True, "min_bucket_reso": 32,
        "max_bucket_reso": 96, "bucket_reso_steps": 16, "train_batch_size": 2, "max_data_loader_n_workers": 0,
        "cache_latents": True, "cache_text_encoder_outputs": True, "timestep_sampling": "shift",
        "model_prediction_type": "raw", "guidance_scale": 1.0, "optimizer_type": "AdamW", "learning_rate": 1e-3,
        "max_train_epochs": 2, "seed": 7, "output_dir": str(output), "output_name": "out",
    }  # fmt: skip
    values |= changes
    path.write_text(toml.dumps({k: v for k, v in values.items() if v is not None}), encoding="utf-8")
    return path


def command(config: Path, *arguments: str, processes: int = 1) -> list[str]:
    """The command line of a run; several processes start under torchrun."""
    script = [str(ROOT / "flux_train_network.py"), "--config_file", str(config), *arguments]
    if processes == 1:
        return [sys.executable, *script]
    launcher = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc_per_node={processes}",
    ]
    return [*launcher, *script]


def run(config: Path, *arguments: str, processes: int = 1, code: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the trainer to its end and check the exit code."""
    done = subprocess.run(
        command(config, *arguments, processes=processes), capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == code, done.stdout[-3000:] + done.stderr[-6000:]
    return done


def run_until(config: Path, sign: str, number: signal.Signals, *arguments: str) -> int:
    """Start a run and signal it, as a terminal does with all its processes, when a line holds `sign`.

    Returns the exit code.
    """
    process = subprocess.Popen(
        command(config, *arguments), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT,
        start_new_session=True, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert process.stdout is not None
    seen = ""
    for line in process.stdout:
        seen += line
        if sign in line:
            os.killpg(process.pid, number)
            break
    seen += process.stdout.read()
    code = process.wait(timeout=120)
    assert sign in seen, seen
    return code
