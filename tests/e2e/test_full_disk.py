"""A disk that refuses: training goes on, what was there before stays whole, the last line says it."""

from __future__ import annotations

import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux_train_network import main
from library.train.checkpoint import MANIFEST, load_run, newest_run
from library.train.naming import step_save, workflow_path
from library.train.resume import capture
from library.train.saving import About, Saver, Weights
from networks.readback import read_back
from tests.e2e.running import draw_pictures, write_config
from tests.train.test_killed_saves import Run, state_at, steps_in


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


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home, where the end of a run may go, and the folder of temporary files, which is not there."""
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return folder


def leave_free(disk: Path, size: int) -> None:
    """Fill a disk but for about `size` bytes."""
    (disk / "ballast").write_bytes(bytes(shutil.disk_usage(disk).free - size))


@pytest.mark.parametrize(
    "options",
    [{}, {"save_model_as": "pt"}, {"network_module": "lycoris.kohya"}],
    ids=["own", "pt", "lycoris"],
)
def test_a_full_disk_takes_nothing_away(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object]
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
    assert f"Nor does it fit into {home} or {tmp_path / 'temporary'}" in said.splitlines()[-1]
    assert not list(home.iterdir()), "an empty folder was left"
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.suffix in kinds} == before
    assert not list((tmp_path / "out").glob(".*")), "half a file was left"


def test_a_small_disk_keeps_the_last_whole_state(
    tmp_path: Path, small_disk: Path, home: Path, capsys: pytest.CaptureFixture[str]
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
    lines = capsys.readouterr().err
    said = lines.replace("\n", " ")
    assert "[disk-space] the run writes" in said, "said before it begins"
    assert said.count("-state could not be written") == 4
    assert "No space left on device" in said
    (folder,) = home.iterdir()
    kept, state = folder / "out.safetensors", folder / "out-state"
    assert f"the last whole network file is {kept}" in said
    assert lines.splitlines()[-1].startswith(
        f"error: {small_disk / 'out.safetensors'} could not be written (No sp"
    )
    assert lines.splitlines()[-1].endswith(
        f"Whole, elsewhere: {kept} and {state}; make room and move it to {small_disk}"
    )
    assert workflow_path(kept).is_file()
    assert load_run(state).state.step == 8
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
    elsewhere = load_file(kept)
    assert all(torch.equal(elsewhere[name], expected[name]) for name in expected)


def test_all_that_ends_a_run_goes_where_it_fits(
    tmp_path: Path, small_disk: Path, home: Path, capsys: pytest.CaptureFixture[str]
):
    """Network, average and state; without a home, the folder of temporary files takes them."""
    home.rmdir()
    (tmp_path / "temporary").mkdir()
    draw_pictures(tmp_path / "data" / "1_waves", [(64, 64)] * 2)
    leave_free(small_disk, 200_000)
    config = write_config(
        tmp_path / "c.toml", tmp_path / "data", small_disk, max_train_epochs=1, ema_decay=0.9, network_dim=32,
        save_state_on_train_end=True, t5xxl_max_token_length=16, cache_latents_to_disk=True,
    )  # fmt: skip
    assert main(["--config_file", str(config)]) == 5
    (folder,) = (tmp_path / "temporary").iterdir()
    last = capsys.readouterr().err.splitlines()[-1]
    for name in ("out.safetensors", "out-ema.safetensors", "out-state"):
        assert str(folder / name) in last
    assert not read_back(folder / "out.safetensors").problems
    assert not read_back(folder / "out-ema.safetensors").problems
    # Moved where there is room, it is what a run goes on from.
    roomy = tmp_path / "roomy"
    roomy.mkdir()
    shutil.move(folder / "out-state", roomy)
    again = ["--config_file", str(config), "--output_dir", str(roomy), "--resume", "auto"]
    assert main([*again, "--max_train_epochs", "2"]) == 0
    assert f"resuming from {roomy / 'out-state'} at step 1" in capsys.readouterr().err.replace("\n", " ")


def saver_of(run: Run) -> Saver:
    return Saver(
        config=run.config, capture=lambda now: capture(now, run.parts), backend=run.backend,
        weights=Weights(run.network, run.optimizer.evaluating, None, judged_by_ema=False),
        about=About(lambda state, epoch: {}),
    )  # fmt: skip


def test_a_state_that_no_later_save_makes_good_for_goes_elsewhere(
    small_disk: Path, home: Path, our_warnings: list[str]
):
    """That of a run that was asked to stop, and that of one that an error ends."""
    saver = saver_of(Run(small_disk))
    leave_free(small_disk, 100_000)
    stopped = saver.interrupted(state_at(5))
    assert home in stopped.parents
    assert load_run(stopped).state.step == 5
    assert str(stopped) in saver.misplaced
    saver.rescue(state_at(6))
    kept = stopped.with_name("out-step00000006-state")
    assert load_run(kept).state.step == 6
    assert our_warnings[-1] == f"what is done, 6 steps, is kept in {kept}; --resume {kept} goes on from there"
    assert not list(small_disk.glob("out*"))


def test_what_is_too_old_makes_room(small_disk: Path, our_warnings: list[str]):
    """Of a run that keeps three saves, four are there while it writes; this disk has room for three and a half."""
    run = Run(small_disk)
    saves = run.save_from(0)
    next(saves)
    size = sum(file.stat().st_size for file in small_disk.rglob("*") if file.is_file())
    leave_free(small_disk, size * 5 // 2)
    assert [next(saves) for _ in range(8)] == list(range(2, 10))
    states = sorted(small_disk.glob("*-state"))
    assert [steps_in(load_run(state).network) for state in states] == [{7}, {8}, {9}]
    assert all((state / MANIFEST).is_file() for state in states)
    assert len(list(small_disk.glob("*.safetensors"))) == 3
    assert set(our_warnings) == {f"{small_disk} is nearly full, so what is too old goes before a save"}


def test_nothing_makes_room_that_is_the_last_of_its_kind(small_disk: Path, our_warnings: list[str]):
    run = Run(small_disk)
    next(run.save_from(0))
    leave_free(small_disk, 100_000)
    before = sorted(small_disk.rglob("*"))
    point = step_save(run.config, step=4)
    assert point is not None
    assert point.retires_model == "out-step00000001"
    saver_of(run).at(point, state_at(4), epoch=1)
    assert sorted(small_disk.rglob("*")) == before
    assert [line.endswith("Training goes on; what is there stays") for line in our_warnings] == [True, True]
