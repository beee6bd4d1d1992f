"""Names, positions and state folders against the spec's vectors and against damage."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from library.config.sections.saving import SavingConfig
from library.errors import CheckpointError
from library.files.atomic import replacing, temporary_folder
from library.files.hashes import file_sha256
from library.train.checkpoint import (
    SavedRun,
    clear_leftovers,
    load_run,
    newest_run,
    remove_run,
    save_run,
    what_is_wrong,
)
from library.train.naming import epoch_save, epoch_stem, last_stem, step_save, step_stem
from library.train.state import TrainState, falling_ratio

NAMES = json.loads((Path(__file__).parents[1] / "data/train/names.json").read_text())


def a_state(step: int = 7, **changes) -> TrainState:
    values = {
        "step": step, "seed": 42, "steps_per_epoch": 5, "plan_fingerprint": "abc", "session_id": 99,
        "started_at": 12.5, "losses": (1.0, 0.5), "validation_losses": ((0, 2.0), (5, 1.0)),
        "samples_seen": 14,
    }  # fmt: skip
    return TrainState(**{**values, **changes})


def a_run(step: int = 7) -> SavedRun:
    return SavedRun(
        state=a_state(step),
        network={"lora.alpha": torch.tensor(4.0), "lora.up": torch.randn(3, 2)},
        optimizer_tensors={"lora.up|exp_avg": torch.randn(3, 2)},
        optimizer_values={"groups": [{"lr": 1e-4}]},
        schedule={"last_epoch": step},
    )


def test_state_survives_json_exactly():
    state = a_state()
    assert TrainState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_state_names_kohyas_position():
    assert a_state(step=7).to_json()["current_epoch"] == 2
    assert a_state(step=5).to_json()["current_epoch"] == 1
    assert a_state(step=7).to_json()["current_step"] == 7


def test_average_is_over_one_epoch():
    state = a_state(losses=())
    for loss in range(8):
        state = state.after_step(loss=float(loss), samples=2)
    assert state.losses == (3.0, 4.0, 5.0, 6.0, 7.0)
    assert state.average_loss == 5.0
    assert state.samples_seen == 14 + 16


def test_falling_ratio_is_last_fifth_over_first_fifth():
    assert falling_ratio([4.0, 4.0, 3, 3, 3, 3, 3, 3, 1.0, 3.0]) == pytest.approx(0.5)
    assert falling_ratio([1.0]) is None
    assert falling_ratio([]) is None
    assert falling_ratio([0.0, 1.0]) is None  # nothing to fall from


def test_saved_run_reads_back(tmp_path):
    run = a_run()
    save_run(tmp_path / "x-state", run)
    back = load_run(tmp_path / "x-state")
    assert back.state == run.state
    assert back.optimizer_values == run.optimizer_values
    assert back.schedule == run.schedule
    for name, tensor in run.network.items():
        assert torch.equal(back.network[name], tensor)
    assert torch.equal(back.optimizer_tensors["lora.up|exp_avg"], run.optimizer_tensors["lora.up|exp_avg"])
    assert [p.name for p in tmp_path.iterdir()] == ["x-state"]


def test_newest_run_skips_damaged_states(tmp_path, caplog):
    for step in (5, 10, 15):
        save_run(tmp_path / f"out-step{step:08d}-state", a_run(step))
    newest = tmp_path / "out-step00000015-state"
    (newest / "model.safetensors").write_bytes(b"half a file")
    shutil.copytree(tmp_path / "out-step00000010-state", tmp_path / "other-step00000099-state")
    assert newest_run(tmp_path, "out") == tmp_path / "out-step00000010-state"
    assert "model.safetensors is damaged" in what_is_wrong(newest)


def test_resume_says_what_is_missing(tmp_path):
    with pytest.raises(CheckpointError, match="no such folder"):
        load_run(tmp_path / "nothing-state")
    (tmp_path / "empty-state").mkdir()
    with pytest.raises(CheckpointError, match=r"no manifest\.json, so it is not a whole state"):
        load_run(tmp_path / "empty-state")


def test_a_state_of_sd_scripts_says_how_to_go_on(tmp_path):
    folder = tmp_path / "out-000002-state"
    folder.mkdir()
    (folder / "optimizer.bin").write_bytes(b"")
    instead = f'instead of resume set network_weights = "{folder / "model.safetensors"}"'
    with pytest.raises(CheckpointError) as caught:
        load_run(folder)
    assert str(caught.value).endswith(instead)
    (folder / "train_state.json").write_text('{"current_epoch": 2, "current_step": 120}')
    with pytest.raises(CheckpointError) as caught:
        load_run(folder)
    assert str(caught.value).endswith(f"{instead} and initial_step = 120")
    (tmp_path / "out-000002.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r'out-000002\.safetensors" and initial_step = 120$'):
        load_run(folder)


def test_epoch_names_and_removal():
    config = SavingConfig(output_name="out", save_every_n_epochs=2, save_last_n_epochs=2)
    points = {e: epoch_save(config, epoch=e, num_epochs=10) for e in range(1, 11)}
    assert {e: p and p.stem for e, p in points.items() if p} == {
        2: "out-000002", 4: "out-000004", 6: "out-000006", 8: "out-000008",
    }  # fmt: skip
    assert points[2].retires_model is None
    assert points[4].retires_model == "out-000000"
    assert points[8].retires_model == "out-000004"
    state_keeps = dataclasses.replace(config, save_last_n_epochs_state=1)
    assert epoch_save(state_keeps, epoch=8, num_epochs=10).retires_state == "out-000006"


def test_step_removal_counts_steps_not_files():
    config = SavingConfig(output_name="out", save_every_n_steps=10, save_last_n_steps=30)
    assert step_save(config, step=7) is None
    assert step_save(config, step=40).retires_model == "out-step00000000"
    assert step_save(config, step=40).retires_state is None
    assert step_save(config, step=50).retires_model == "out-step00000010"
    assert step_save(SavingConfig(save_every_n_steps=5), step=120).stem == "at-step00000120"


def test_ratio_of_epochs():
    config = SavingConfig(save_n_epoch_ratio=4)
    assert [e for e in range(1, 11) if epoch_save(config, epoch=e, num_epochs=10)] == [2, 4, 6, 8]


@pytest.mark.parametrize("index", [0, 1])
def test_files_are_named_as_the_reference_names_them(index):
    name = (None, "my")[index]
    stems = {"epoch3": epoch_stem(name, 3), "step120": step_stem(name, 120), "last": last_stem(name)}
    assert stems == {
        key: files[index].removesuffix(".safetensors") for key, files in NAMES["file_names"].items()
    }


@pytest.mark.parametrize("case", NAMES["removal"], ids=str)
def test_the_file_that_goes_is_the_one_the_reference_removes(case):
    options = {key: value for key, value in case.items() if key.startswith("save_")}
    config = SavingConfig(output_name="out", **options)
    if "remove_step" in case:
        point, removed = step_save(config, step=case["at"]), step_stem("out", case["remove_step"])
    else:
        point, removed = (
            epoch_save(config, epoch=case["at"], num_epochs=99),
            epoch_stem("out", case["remove_epoch"]),
        )
    assert point.retires_model == removed


def test_auto_resume_takes_no_state_of_an_output_whose_name_begins_alike(tmp_path: Path):
    save_run(tmp_path / "lora-000001-state", a_run(5))
    for name in ("lora-v2-step00000090-state", "lora-v2-state", "lora2-state", "lora-1-state", "lora-states"):
        save_run(tmp_path / name, a_run(90))
    assert newest_run(tmp_path, "lora") == tmp_path / "lora-000001-state"
    save_run(tmp_path / "lora-step00000007-state.old", a_run(7))  # killed while a new one took its name
    assert newest_run(tmp_path, "lora") == tmp_path / "lora-step00000007-state.old"
    assert newest_run(tmp_path, "lora-v2").name == "lora-v2-step00000090-state"
    assert newest_run(tmp_path, None) is None
    save_run(tmp_path / "at-step00000003-state", a_run(3))
    assert newest_run(tmp_path, None) == tmp_path / "at-step00000003-state"


def half_written(path: Path) -> Path:
    """What is left of a process that was killed while it wrote `path`."""
    process = os.fork()
    if process == 0:
        with replacing(path) as temporary:
            temporary.write_bytes(b"half a file")
            os._exit(0)
    os.waitpid(process, 0)
    (left,) = path.parent.glob(f".{path.name}.*")
    return left


def test_what_killed_runs_left_goes_with_the_next_run_of_the_output(tmp_path: Path):
    long = "a name that says what it is, of whom, by whom, and when"
    for name in ("out", long):
        gone = [half_written(tmp_path / f"{stem}.safetensors") for stem in (name, f"{name}-step00000010")]
        gone += [temporary_folder(tmp_path / f"{stem}-state") for stem in (name, f"{name}-000002")]
        save_run(tmp_path / f"{name}-000001-state", a_run(5))
        gone.append(shutil.copytree(tmp_path / f"{name}-000001-state", tmp_path / f"{name}-000001-state.old"))
        # Of another output, of nobody we know, and what only waits for its successor.
        stays = [
            half_written(tmp_path / f"{name}-v2.safetensors"),
            temporary_folder(tmp_path / f"{name}-v2-state"),
        ]
        # Names that could be another run's go when they are too old to be written at this moment.
        old = [
            half_written(tmp_path / f"{name}-best.workflow.json"),
            half_written(tmp_path / f"{name}.report.html"),
        ]
        for path in old:
            os.utime(path, (0, 0))
        gone += old
        stays.append(half_written(tmp_path / f"{name}-ema.workflow.json"))
        stays += [tmp_path / ".out.safetensors", tmp_path / ".tmp", tmp_path / "x.tmp"]
        for path in stays[3:]:
            path.touch()
        save_run(tmp_path / f"{name}-step00000007-state.old", a_run(7))
        stays += [tmp_path / f"{name}-000001-state", tmp_path / f"{name}-step00000007-state.old"]
        assert newest_run(tmp_path, name) == stays[-1]
        clear_leftovers(tmp_path, name)
        assert not [path for path in gone if path.exists()]
        assert all(path.exists() for path in stays)


def test_a_state_that_was_replaced_is_older_than_its_successor(tmp_path: Path):
    save_run(tmp_path / "out-step00000007-state.old", a_run(7))
    save_run(tmp_path / "out-step00000007-state", a_run(7))
    assert newest_run(tmp_path, "out") == tmp_path / "out-step00000007-state"


def test_a_state_removed_leaves_nothing(tmp_path: Path):
    save_run(tmp_path / "out-state", a_run())
    remove_run(tmp_path / "out-state")
    assert not list(tmp_path.iterdir())


def test_a_state_with_a_damaged_manifest_or_of_another_version_is_refused(tmp_path: Path):
    folder = tmp_path / "out-state"
    save_run(folder, a_run())
    manifest = (folder / "manifest.json").read_text()
    (folder / "manifest.json").write_text(manifest[:20])
    assert what_is_wrong(folder) == "its manifest.json is damaged; take an older state"
    values = json.loads((folder / "train_state.json").read_text())
    (folder / "train_state.json").write_text(json.dumps({**values, "version": 2}))
    hashes = {**json.loads(manifest), "train_state.json": file_sha256(folder / "train_state.json")}
    (folder / "manifest.json").write_text(json.dumps(hashes))
    with pytest.raises(CheckpointError, match="a state of version 2, this program reads 1"):
        load_run(folder)
