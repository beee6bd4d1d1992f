"""Where the time of a run goes: parts that add up to the wall time, laps of a step, and what is said of waiting."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from flux_train_network import main
from library.report.page import content_of
from library.train import spent
from library.train.reading import Laps
from library.train.run_log import Ended, Line, Record, Started, Stepped, Warned, log_path, read_log
from library.train.spent import CACHING, DATA, OTHER, PASSES, REST, SAMPLES, SAVING, START, VALIDATION, Spent
from tests.e2e.running import draw_pictures, write_config
from tests.report.made import started, stepped

WITH_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")


def waited(seconds: float, *, steps: int = 10, options: dict[str, object] | None = None) -> Spent:
    """Steps of two seconds, of each of which so many went into waiting."""
    lines = [Line(0.0, replace(started(total=steps), options=options or {}))]
    lines += [Line(2.0 * n, stepped(n, total=steps, waited=seconds)) for n in range(1, steps + 1)]
    return Spent(lines)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=WITH_GPU)])
def test_laps_have_what_went_on_between_their_marks(device: str):
    laps = Laps(torch.device(device))
    for _ in range(2):
        time.sleep(0.02)
        laps.mark("slept")
        laps.mark("nothing")
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = laps.seconds()
    assert list(seconds) == ["slept", "nothing"]
    assert seconds["slept"] > max(0.039, seconds["nothing"])


def test_parts_of_a_run_add_up_to_its_wall_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(spent, "MUCH", 0.0)  # a tiny run waits for microseconds
    monkeypatch.setattr(spent, "NOTABLE", 0.0)
    data = draw_pictures(tmp_path / "data" / "1_waves", [(64, 64)] * 5).parent
    config = write_config(
        tmp_path / "c.toml", data, tmp_path / "out", validation_split=0.2, train_batch_size=1, max_train_epochs=None,
        max_train_steps=4, gradient_accumulation_steps=2, save_every_n_steps=2, save_state=True,
        sample_prompts="waves --w 32 --h 32 --s 1", sample_every_n_steps=2,
    )  # fmt: skip
    state = tmp_path / "out" / "out-step00000002-state"
    began = time.perf_counter()
    assert main(["--config_file", str(config)]) == 0
    assert main(["--config_file", str(config), "--resume", str(state)]) == 0
    wall = time.perf_counter() - began
    lines = read_log(log_path(tmp_path / "out", "out"))
    starts = [n for n, line in enumerate(lines) if isinstance(line.record, Started)]
    of_processes = sum(
        lines[end - 1].time - lines[begin].time + sum(lines[begin].record.start_seconds.values())
        for begin, end in zip(starts, [*starts[1:], len(lines)], strict=True)
    )
    totals = Spent(lines).totals()
    assert sum(totals.values()) == pytest.approx(of_processes, abs=1e-6)
    assert of_processes <= wall + 0.1
    assert {PASSES, DATA, REST, VALIDATION, SAMPLES, SAVING, CACHING, START, OTHER} >= totals.keys()
    assert totals.keys() >= {PASSES, DATA, VALIDATION, SAMPLES, SAVING, CACHING, START}
    steps = [line.record for line in lines if isinstance(line.record, Stepped)]
    assert all(0 < step.data_seconds + step.forward_backward_seconds <= step.seconds for step in steps)
    content = content_of(tmp_path / "out" / "out.report.html")
    shown = {row["name"]: row["value"] for row in content["time"]}
    assert shown == pytest.approx({part: totals[part] for part in shown}, abs=0.05)
    assert content["run"]["seconds"] == pytest.approx(of_processes, abs=0.1)
    assert content["time_advice"] == Spent(lines).advice()
    said = " ".join(capsys.readouterr().err.split())
    assert said.count("training steps waited for data") == 2  # at the end of each process


def test_a_lap_that_lies_in_the_step_before_counts_whole():
    """Where steps run ahead, the wait for a batch is seen in the seconds of the step that is read after it."""
    lines = [Line(0.0, started(total=2))]
    lines += [
        Line(5.0, replace(stepped(1, total=2), seconds=5.0, data_seconds=0.0, forward_backward_seconds=1.0))
    ]
    lines += [
        Line(6.0, replace(stepped(2, total=2), seconds=1.0, data_seconds=4.0, forward_backward_seconds=1.0))
    ]
    totals = Spent(lines).totals()
    assert (totals[DATA], totals[PASSES]) == (4.0, 2.0)
    assert REST not in totals


def test_a_warning_ends_nothing_and_a_log_without_laps_is_not_split():
    old = replace(stepped(1, total=1), data_seconds=None, forward_backward_seconds=None)
    records: list[tuple[float, Record]] = [
        (0.0, replace(started(total=1), start_seconds={})),
        (9.0, Warned(step=0, level="WARNING", message="slow")),
        (12.0, old),
        (12.5, Ended(step=1, why="done", message="")),
    ]
    assert Spent([Line(*one) for one in records]).totals() == {"training": 2.0, START: 10.0, OTHER: 0.5}


def test_much_waiting_is_told_with_what_helps():
    said = waited(1.5).advice()
    assert said is not None
    assert said.startswith("training steps waited for data 75% of their time: set cache_latents_to_disk, ")
    assert "raise max_data_loader_n_workers (it is 8;" in said
    cached = waited(1.5, options={"cache_latents": True, "max_data_loader_n_workers": 0}).advice()
    assert cached is not None
    assert "cache_latents_to_disk" not in cached
    assert "(it is 0;" in cached


@pytest.mark.parametrize(("seconds", "steps"), [(0.1, 1000), (1.5, 5)])
def test_little_waiting_is_not_spoken_of(seconds: float, steps: int):
    assert waited(seconds, steps=steps).advice() is None
