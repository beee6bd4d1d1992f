"""One rank caches far longer than the process group waits; ranks killed at half of it go on with what is missing."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

from library.distributed import launch
from library.models.autoencoder import Encoder
from library.models.text_encoders import T5Encoder
from tests.distributed.ranks import start
from tests.distributed.recorder import recorded, steps_of
from tests.e2e.running import draw_pictures, write_config

RANKS, IMAGES = 4, 16
TIMEOUT = float(os.environ.get("POLYRANK_TEST_TIMEOUT", "4"))  # seconds that a collective waits
SLOW = 3 * TIMEOUT  # seconds that one rank caches longer than the others


@contextmanager
def caching(folder: Path, *, seconds: float, of_rank: int | None) -> Iterator[None]:
    """Every image and every caption that is encoded is a line in `folder`, and takes so long on one rank or all."""
    folder.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ["RANK"])

    def encoding(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, Encoder | T5Encoder):
            with (folder / f"rank{rank}.txt").open("a", encoding="utf-8") as file:
                file.write(f"{type(module).__name__}\n" * len(inputs[0]))
            if of_rank in (None, rank):
                time.sleep(seconds)

    hook = torch.nn.modules.module.register_module_forward_pre_hook(encoding)
    with patch.object(launch, "DEFAULT_TIMEOUT", timedelta(seconds=TIMEOUT)), recorded(folder / "steps"):
        try:
            yield
        finally:
            hook.remove()


def encoded(folder: Path) -> list[int]:
    """How many images and captions each rank encoded."""
    files = (folder / f"rank{rank}.txt" for rank in range(RANKS))
    return [len(file.read_text("utf-8").splitlines()) if file.exists() else 0 for file in files]


def test_ranks_wait_for_a_slow_one_and_a_killed_pass_goes_on_where_it_was(tmp_path: Path):
    data = draw_pictures(tmp_path / "data" / "1_x", [(32, 32)] * IMAGES)
    config = write_config(
        tmp_path / "c.toml", data.parent, tmp_path / "out", max_train_epochs=None, max_train_steps=1, network_dim=2,
        train_batch_size=1, resolution="32,32", t5xxl_max_token_length=16, cache_latents_to_disk=True,
        cache_text_encoder_outputs_to_disk=True, vae_batch_size=1, text_encoder_batch_size=1,
    )  # fmt: skip

    def ranks(name: str, **how: Any) -> Any:
        return start(
            ["--config_file", str(config)], ranks=RANKS, screens=tmp_path / name / "screens",
            around=partial(caching, tmp_path / name, **how),
        )  # fmt: skip

    def cached() -> dict[Path, tuple[int, int]]:
        return {file: (file.stat().st_mtime_ns, file.stat().st_ino) for file in data.glob("[!.]*.npz")}

    running = ranks("killed", seconds=0.05, of_rank=None)
    while len(cached()) <= IMAGES and all(process.is_alive() for process in running.processes):
        time.sleep(0.01)
    running.kill()
    for left in data.glob(".*"):  # half a file, of an hour ago
        os.utime(left, (time.time() - 4000,) * 2)
    before = cached()
    assert IMAGES < len(before) < 2 * IMAGES, running.said()
    missing = 2 * IMAGES - len(before)

    began = time.monotonic()
    left = -(-missing // RANKS)  # of the rank that lacks most, at least
    running = ranks("again", seconds=SLOW / left, of_rank=3)
    assert running.ended(within=60 + 2 * SLOW) == [0] * RANKS, running.said(3)
    assert time.monotonic() - began > 2 * TIMEOUT
    assert sum(encoded(tmp_path / "again")) == missing
    assert encoded(tmp_path / "again")[3] > 1
    after = cached()
    assert len(after) == 2 * IMAGES
    assert all(after[file] == at for file, at in before.items())
    assert set(steps_of(tmp_path / "again" / "steps")) == {1}
    assert not list(data.glob(".*")), "half a file was left"
