"""A disk that refuses: training goes on, what was there before stays whole, the last line says it."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux_train_network import main
from library.train.checkpoint import newest_run
from networks.readback import read_back
from tests.e2e.running import draw_pictures, write_config


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system refuses to write beyond `size` bytes of a file meanwhile, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 20 MB; only root may mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@pytest.mark.parametrize(
    "options",
    [{}, {"save_model_as": "pt"}, {"network_module": "lycoris.kohya"}],
    ids=["own", "pt", "lycoris"],
)
def test_a_full_disk_takes_nothing_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object]
):
    draw_pictures(tmp_path / "data" / "1_waves", [(64, 64)] * 2)
    config = write_config(
        tmp_path / "c.toml", tmp_path / "data", tmp_path / "out", max_train_epochs=None, max_train_steps=3,
        train_batch_size=1, save_every_n_steps=1, save_last_n_steps=1, save_state=True, cache_latents_to_disk=True,
        t5xxl_max_token_length=16, **options,
    )  # fmt: skip
    assert main(["--config_file", str(config), "--max_train_steps", "2", "--save_last_n_steps", "9"]) == 0
    kinds = (".safetensors", ".pt")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.suffix in kinds}
    assert before
    capsys.readouterr()
    with files_no_larger_than(10_000):
        assert main(["--config_file", str(config), "--resume", "auto"]) == 5
    said = capsys.readouterr().err.replace("\n", " ")
    assert "Training goes on" in said
    assert "Traceback" not in said
    last = f"out.{options.get('save_model_as', 'safetensors')}"
    assert f"error: {tmp_path / 'out' / last} could not be written" in said
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.suffix in kinds} == before
    assert not list((tmp_path / "out").glob(".*")), "half a file was left"


def test_a_small_disk_keeps_the_last_whole_state(
    tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
):
    draw_pictures(tmp_path / "data" / "1_waves", [(64, 64)] * 2)

    def config(output: Path) -> str:
        return str(
            write_config(
                tmp_path / f"{output.name}.toml",
                tmp_path / "data",
                output,
                max_train_epochs=None,
                max_train_steps=8,
                train_batch_size=1,
                network_dim=32,
                save_every_n_steps=2,
                save_state=True,
                cache_latents_to_disk=True,
                t5xxl_max_token_length=16,
            )
        )

    # 3 MB of network and 8 MB of state each time: one of each fits, then the networks alone, but for the last.
    assert main(["--config_file", config(small_disk)]) == 5
    said = capsys.readouterr().err.replace("\n", " ")
    assert "[disk-space] the run writes" in said, "said before it begins"
    assert said.count("-state could not be written") == 3
    assert "No space left on device" in said
    assert f"the last whole network file is {small_disk / 'out-step00000008.safetensors'}" in said
    assert f"the last whole state is {small_disk / 'out-step00000002-state'}" in said
    assert said.rstrip().endswith("is the disk full?")
    for step in (2, 4, 6, 8):
        assert not read_back(small_disk / f"out-step{step:08d}.safetensors").problems
    assert not list(small_disk.glob(".*")), "half a file was left"
    assert newest_run(small_disk, "out") == small_disk / "out-step00000002-state"
    # With room again, the run goes on from there to what it would have been.
    for file in small_disk.glob("*.safetensors"):
        file.unlink()
    assert main(["--config_file", config(small_disk), "--resume", "auto", "--save_every_n_steps", "99"]) == 0
    assert main(["--config_file", config(tmp_path / "whole")]) == 0
    found, expected = (load_file(folder / "out.safetensors") for folder in (small_disk, tmp_path / "whole"))
    assert all(torch.equal(found[name], expected[name]) for name in expected)
