"""A disk that refuses rank 0 alone, while all ranks hold parts of the weights: the run goes on, or ends elsewhere."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

from safetensors.torch import load_file

from networks.interface import NetworkHandle
from networks.readback import read_back
from tests.distributed.ranks import start
from tests.e2e.running import draw_pictures, write_config


@contextmanager
def refused_once() -> Iterator[None]:
    """Within a rank: its first network file meets a full disk."""
    save, refused = NetworkHandle.save, []

    def full(self, path, **options):
        if not refused:
            refused.append(path)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(self, path, **options)

    with patch.object(NetworkHandle, "save", full):
        yield


def test_zero_3_goes_on_where_a_file_was_refused(tmp_path: Path):
    draw_pictures(tmp_path / "data" / "1_waves", [(64, 64)] * 4)

    def trained(name: str, **given) -> dict:
        config = write_config(
            tmp_path / f"{name}.toml", tmp_path / "data", tmp_path / name, train_batch_size=1,
            max_train_epochs=None, max_train_steps=3, save_every_n_steps=1, deepspeed=True, zero_stage=3,
            t5xxl_max_token_length=16, cache_latents_to_disk=True,
        )  # fmt: skip
        running = start(["--config_file", str(config)], ranks=2, screens=tmp_path / "said" / name, **given)
        assert running.ended(within=60.0) == [0, 0], running.said()
        if given:
            assert "No space left on device" in running.said()
        saved = {file.name for file in (tmp_path / name).glob("*.safetensors")}
        steps = {f"out-step0000000{step}.safetensors" for step in ((2, 3) if given else (1, 2, 3))}
        assert saved == {*steps, "out.safetensors"}
        return load_file(tmp_path / name / "out.safetensors")

    refused, whole = trained("refused", around=refused_once), trained("whole")
    assert all(bool((refused[key] == whole[key]).all()) for key in whole)


@contextmanager
def refused_last(output: Path, home: Path) -> Iterator[None]:
    """Within a rank: the disk is full when the run ends."""
    save = NetworkHandle.save

    def full(self, path, **options):
        if path == output / "out.safetensors":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        save(self, path, **options)

    with (
        patch.object(NetworkHandle, "save", full),
        patch.dict(os.environ, HOME=str(home)),
        patch("library.leaving.FOLLOW_SECONDS", 0.1),
    ):
        yield


def test_zero_3_ends_elsewhere_where_its_last_file_was_refused(tmp_path: Path):
    draw_pictures(tmp_path / "data" / "1_waves", [(64, 64)] * 4)
    home, output = tmp_path / "home", tmp_path / "out"
    home.mkdir()
    config = write_config(
        tmp_path / "c.toml", tmp_path / "data", output, train_batch_size=1, max_train_epochs=None,
        max_train_steps=1, ema_decay=0.9, deepspeed=True, zero_stage=3, t5xxl_max_token_length=16,
        cache_latents_to_disk=True,
    )  # fmt: skip
    running = start(
        ["--config_file", str(config)],
        ranks=2,
        screens=tmp_path / "said",
        around=partial(refused_last, output, home),
    )
    assert running.ended(within=60.0) == [5, 1], running.said()
    (folder,) = home.iterdir()
    assert running.said().endswith(
        f"Whole, elsewhere: {folder / 'out.safetensors'}; make room and move it to {output}"
    )
    assert not read_back(folder / "out.safetensors").problems
    assert (output / "out-ema.safetensors").is_file()
    assert "Traceback" not in running.said() + running.said(1)
