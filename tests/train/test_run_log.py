"""The run log: what is written is read back, a resumed run goes on in it, and a disk that refuses costs a warning."""

from __future__ import annotations

import json
import logging
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from flux_train_network import main
from library.train.run_log import (
    KINDS,
    Ended,
    Line,
    Outlier,
    Outliers,
    Record,
    RunLog,
    Sampled,
    Saved,
    Started,
    Stepped,
    Validated,
    Warned,
    log_path,
    read_log,
)
from tests.e2e.running import draw_pictures, write_config


def stepped(step: int) -> Stepped:
    return Stepped(
        step=step, epoch=1, loss=0.5, average_loss=0.6, learning_rates={"unet": 1e-4}, grad_norm=0.25, seconds=2.0,
        images_per_second=4.0, memory_gb=None, skipped=False, data_seconds=0.5, forward_backward_seconds=1.0,
    )  # fmt: skip


RECORDS: tuple[Record, ...] = (
    Started(
        step=0, total_steps=9, num_epochs=3, steps_per_epoch=3, resumed=False, num_ranks=2, device="cpu", num_images=6,
        num_validation_images=2, options={"network_dim": 4, "sample_prompts": "a fox"},
        start_seconds={"imports": 2.0},
    ),
    Validated(step=0, loss=1.5, by_timestep={"200": 2.0, "400": 1.0}, best=False),
    stepped(1),
    stepped(2),
    Sampled(step=2, prompt_number=0, prompt="a fox, größer", file="sample/a.png"),
    Saved(step=2, what="model", file="out-step00000002.safetensors"),
    Warned(step=2, level="WARNING", message="two\nlines"),
    stepped(3),
    Outliers(step=3, epoch=1, images=[Outlier(image="0/1_x/a.png", score=5.5, loss=1.75, visits=4)]),
    Ended(step=3, why="done", message=""),
)  # fmt: skip


def written(path: Path, *records: Record, after_step: int | None = None) -> list[Line]:
    log = RunLog(path, after_step=after_step)
    for record in records:
        log.write(record)
    log.close()
    return read_log(path)


def test_what_is_written_is_read_back(tmp_path: Path):
    lines = written(tmp_path / "new" / "x.jsonl", *RECORDS)
    assert [line.record for line in lines] == list(RECORDS)
    assert {type(record) for record in RECORDS} == set(KINDS.values())
    assert [line.time for line in lines] == sorted(line.time for line in lines)
    raw = [json.loads(text) for text in (tmp_path / "new" / "x.jsonl").read_text("utf-8").splitlines()]
    for values, record in zip(raw, RECORDS, strict=True):
        assert values.pop("time") > 0
        assert KINDS[values.pop("kind")] is type(record)
        assert values == asdict(record)


def test_a_resumed_run_drops_what_lies_behind_it(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    written(path, *RECORDS)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"kind": "step", "time": 1.0, "st')  # killed while it wrote
    assert [line.record for line in read_log(path)] == list(RECORDS)
    again = written(path, stepped(3), after_step=2)
    assert [line.record for line in again] == [*RECORDS[:7], stepped(3)]
    assert [line.record for line in written(path, stepped(1))] == [stepped(1)]


def test_a_later_version_adds_kinds_and_fields(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text(
        '{"kind": "weather", "time": 1, "step": 1}\n'
        '{"kind": "save", "time": 2, "step": 1, "what": "model", "file": "a", "more": 1}\n',
        encoding="utf-8",
    )
    assert read_log(path) == [Line(2.0, Saved(step=1, what="model", file="a"))]


def test_an_older_version_lacks_fields(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    written(path, RECORDS[0], stepped(1))
    new = {"data_seconds", "forward_backward_seconds", "start_seconds"}
    old = [json.loads(text) for text in path.read_text("utf-8").splitlines()]
    path.write_text("".join(json.dumps({k: one[k] for k in one.keys() - new}) + "\n" for one in old), "utf-8")
    start, step = (line.record for line in read_log(path))
    assert isinstance(start, Started)
    assert start.start_seconds == {}
    assert step == replace(stepped(1), data_seconds=None, forward_backward_seconds=None)


def test_numbers_that_json_lacks_are_none(tmp_path: Path):
    record = Validated(step=1, loss=float("nan"), by_timestep={"200": float("inf")}, best=False)
    written(tmp_path / "x.jsonl", record)
    values = json.loads((tmp_path / "x.jsonl").read_text("utf-8"))
    assert values["loss"] is None
    assert values["by_timestep"] == {"200": None}


def test_a_log_that_cannot_be_written_is_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    (tmp_path / "folder").write_text("", encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        log = RunLog(tmp_path / "folder" / "x.jsonl", after_step=None)
        log.write(stepped(1))
        log.close()
        full = RunLog(Path(tmp_path / "x.jsonl"), after_step=None)
        full._file = Path("/dev/full").open("w", encoding="utf-8")  # noqa: SIM115 - a disk without room
        full.write(Saved(step=1, what="model", file="a"))
        full.write(stepped(2))
    assert [r.getMessage().count("ends here, training goes on") for r in caplog.records] == [1, 1]


def test_a_resumed_run_goes_on_in_its_log(tmp_path: Path):
    draw_pictures(tmp_path / "data" / "1_waves", [(64, 64)] * 4)
    options = {
        "save_every_n_steps": 2, "save_state": True, "max_train_epochs": 2, "train_batch_size": 1,
        "t5xxl_max_token_length": 16, "validation_split": 0.25, "xformers": False,
    }  # fmt: skip
    config = write_config(tmp_path / "c.toml", tmp_path / "data", tmp_path / "out", **options)
    assert main(["--config_file", str(config)]) == 0
    path = log_path(tmp_path / "out", "out")
    before = read_log(path)
    state = tmp_path / "out" / "out-step00000004-state"
    assert main(["--config_file", str(config), "--resume", str(state)]) == 0
    lines = read_log(path)
    kept = [line for line in before if line.record.step <= 4]
    assert lines[: len(kept)] == kept
    records = [line.record for line in lines]
    starts = [r for r in records if isinstance(r, Started)]
    assert [(r.step, r.resumed, r.total_steps, r.num_images) for r in starts] == [
        (0, False, 6, 3),
        (4, True, 6, 3),
    ]
    assert [r.step for r in records if isinstance(r, Stepped)] == list(range(1, 7))
    assert [r.epoch for r in records if isinstance(r, Stepped)] == [1, 1, 1, 2, 2, 2]
    assert [r.step for r in records if isinstance(r, Validated)] == [0, 3, 6]
    assert [r.step for r in records if isinstance(r, Saved) and r.what == "state"] == [2, 4, 6, 6]
    assert records[-1] == Ended(step=6, why="done", message="")
    assert starts[0].options["network_dim"] == 4
    assert not {"output_dir", "xformers", "wandb_api_key"} & starts[0].options.keys(), (
        "changed and public ones only"
    )


def test_no_log_is_kept_where_none_is_wanted_and_an_error_is_its_end(tmp_path: Path):
    draw_pictures(tmp_path / "data" / "1_waves", [(64, 64)] * 2)
    options = {
        "max_train_epochs": None, "max_train_steps": 2, "t5xxl_max_token_length": 16, "optimizer_type": "SGD",
        "learning_rate": 1e30, "max_grad_norm": 0.0,
    }  # fmt: skip
    config = write_config(tmp_path / "c.toml", tmp_path / "data", tmp_path / "out", **options)
    assert main(["--config_file", str(config), "--no_run_log", "--max_train_steps", "1"]) == 0
    assert not log_path(tmp_path / "out", "out").exists()
    assert main(["--config_file", str(config)]) == 3
    end = read_log(log_path(tmp_path / "out", "out"))[-1].record
    assert isinstance(end, Ended)
    assert end.why == "error"
    assert end.message.startswith("step 2: the loss is")
