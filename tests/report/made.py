"""Logs and contents of runs that tests show: every figure made of the step's number."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from library.report.content import Composer, Known
from library.train.run_log import (
    Ended,
    Line,
    Outlier,
    Outliers,
    Record,
    Sampled,
    Saved,
    Started,
    Stepped,
    Validated,
    Warned,
)

START = 1_700_000_000.0
HOSTILE = "</script><script>document.title = 'owned'</script><img src=x onerror=\"document.title='owned'\"> & \u2028"


def started(step: int = 0, *, total: int, resumed: bool = False) -> Started:
    return Started(
        step=step, total_steps=total, num_epochs=10, steps_per_epoch=max(1, total // 10), resumed=resumed,
        num_ranks=2, device="NVIDIA H100", num_images=8, num_validation_images=2, options={"learning_rate": 1e-4},
        start_seconds={"imports": 4.0, "caches": 16.0},
    )  # fmt: skip


def stepped(step: int, *, total: int, waited: float = 0.125) -> Stepped:
    loss = 0.5 * math.exp(-step / total) + 0.05 * math.sin(step * 1.7)
    return Stepped(
        step=step, epoch=1 + (step - 1) * 10 // total, loss=loss, average_loss=loss,
        learning_rates={"unet": 1e-4 * (1 - step / total)}, grad_norm=0.2 + 0.1 * math.cos(step), seconds=2.0,
        images_per_second=4.0, memory_gb=40.0, skipped=False, data_seconds=waited, forward_backward_seconds=1.5,
    )  # fmt: skip


def log(total: int, *, samples: int = 0, prompts: int = 1, why: str = "done") -> list[Line]:
    """A run of `total` steps of two seconds, with samples of `prompts` prompts at `samples` steps."""
    lines = [Line(START, started(total=total))]

    def add(seconds: float, record: Record) -> None:
        lines.append(Line(lines[-1].time + seconds, record))

    add(10, Validated(step=0, loss=1.0, by_timestep={"200": 0.5, "800": 1.5}, best=True))
    due = sample_steps(total, samples)
    for step in range(1, total + 1):
        add(2, stepped(step, total=total))
        if step in due:
            for prompt in range(prompts):
                add(
                    1,
                    Sampled(
                        step=step, prompt_number=prompt, prompt=f"prompt {prompt}", file=f"sample/{step}"
                    ),
                )
        if step % max(1, total // 4) == 0:
            loss = 0.5 + abs(step - total / 2) / total
            add(5, Validated(step=step, loss=loss, by_timestep={"200": 0.3, "800": 1.2}, best=False))
            add(3, Saved(step=step, what="model", file=f"run-step{step:08d}.safetensors"))
    add(0, Warned(step=total, level="WARNING", message=f"a warning {HOSTILE}"))
    add(0, Outliers(step=total, epoch=10, images=[Outlier(image="0/a/b.png", score=5.0, loss=1.8, visits=9)]))
    add(0, Ended(step=total, why=why, message=""))
    return lines


def sample_steps(total: int, samples: int) -> list[int]:
    return [round(total * number / samples) for number in range(1, samples + 1)]


def draw_samples(folder: Path, total: int, *, samples: int, prompts: int, side: int) -> None:
    """Pictures named as a run of output_name "run" names them, with as much detail as photographs have."""
    (folder / "sample").mkdir(parents=True)
    x, y = np.meshgrid(np.linspace(0, 3, side), np.linspace(0, 3, side))
    random = np.random.default_rng(0)
    for step in sample_steps(total, samples):
        for prompt in range(prompts):
            waves = np.stack(
                [np.sin(x * (prompt + 1) + channel + step) * np.cos(y * channel) for channel in range(3)], -1
            )
            noisy = waves * 100 + 128 + random.normal(size=waves.shape) * 9
            name = f"run_{step:06d}_{prompt:02d}_20991231235959_7.png"
            Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(
                folder / "sample" / name, compress_level=1
            )


def content(folder: Path, lines: list[Line], **known: Any) -> dict[str, Any]:
    """What the report of a run in `folder` shows."""
    prompts: Mapping[int, dict[str, object]] = known.pop(
        "prompts", {0: {"text": HOSTILE, "details": "64x64"}}
    )
    return Composer(Known(name="run", folder=folder, output_name="run", prompts=prompts, **known)).content(
        lines
    )
