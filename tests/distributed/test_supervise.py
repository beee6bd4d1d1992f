"""Ranks that this process starts: their surroundings, and which of their endings counts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from library.config.load import load_config
from library.distributed import launch, supervise
from library.distributed.supervise import (
    at_fault,
    rank_environment,
    ranks_to_start,
    run_ranks,
    without_report,
)
from library.distributed.watch import Ends
from library.errors import ConfigError, EnvironmentUnsupported, Interrupted, RankFollowed, RankLost
from library.leaving import (
    FOLLOW_SECONDS,
    GRACE_SECONDS,
    TOGETHER_SECONDS,
    Ending,
    ending_of,
    leave,
    read_report,
    write_report,
)

WORKER = Path(__file__).parent / "broken_worker.py"
ROOT = WORKER.parent.parent.parent
RAN = ["--pretrained_model_name_or_path", "polyrank/tiny-flux", "--network_module", "networks.lora_flux",
       "--train_data_dir", "data", "--output_dir", "out"]  # fmt: skip


def ending(rank: int, when: float, **changes: object) -> Ending:
    values = {"code": 1, "sentence": f"error of {rank}", "on_purpose": False, "rank": rank, "when": when}
    return Ending(**{**values, **changes})


def test_what_a_rank_finds_in_its_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(supervise, "usable_cores", lambda: 12)
    given = {"PATH": "/bin", "WORLD_SIZE": "9"}
    found = [rank_environment(given, rank, 4, 2345, 7, Path("/reports")) for rank in range(4)]
    assert [one["RANK"] for one in found] == [one["LOCAL_RANK"] for one in found] == ["0", "1", "2", "3"]
    assert {(one["WORLD_SIZE"], one["LOCAL_WORLD_SIZE"], one["PATH"]) for one in found} == {
        ("4", "4", "/bin")
    }
    assert {(one["MASTER_ADDR"], one["MASTER_PORT"], one["OMP_NUM_THREADS"]) for one in found} == {
        ("127.0.0.1", "2345", "3")
    }
    # What the user has set stays.
    assert rank_environment({"OMP_NUM_THREADS": "5"}, 0, 4, 1, 1, Path())["OMP_NUM_THREADS"] == "5"


def test_who_is_at_fault():
    memory = ending(1, 5.0, code=6, on_purpose=True)
    lost, bug = ending(0, 4.9, echo=True, on_purpose=True), ending(2, 5.1)
    follower = ending(3, 1.0, echo=True, on_purpose=True)
    killed, aborted = without_report(4, -signal.SIGKILL, None), without_report(5, -signal.SIGABRT, None)
    assert at_fault([]) is None
    assert at_fault([follower, lost, memory]) is memory
    assert at_fault([lost, bug, aborted]) is bug
    assert at_fault([follower, lost, killed, aborted]) is killed
    assert at_fault([follower, aborted]) is aborted
    assert (killed.code, killed.rank) == (137, 4)
    assert "SIGKILL" in killed.sentence
    # What all ranks say the first one says, whoever was the quickest.
    stopped = [ending(rank, 9.0 - rank, code=4, on_purpose=True, sentence="stopped") for rank in range(3)]
    assert at_fault(stopped) is stopped[0]


def test_a_stop_signal_before_training_is_no_fault():
    asked = without_report(1, -signal.SIGTERM, signal.SIGTERM)
    assert (asked.code, asked.rank) == (143, 0)
    assert asked.sentence.startswith("stopped by SIGTERM before training began")
    assert "error" in without_report(1, -signal.SIGTERM, None).sentence


def test_the_first_report_of_a_rank_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RANK", "2")
    assert read_report(tmp_path, 2) is None
    first = ending_of(ConfigError("a"))
    write_report(tmp_path, first)
    write_report(tmp_path, ending_of(RankFollowed("b")))
    assert read_report(tmp_path, 2) == first
    assert (first.rank, first.code, first.sentence) == (2, 2, "error: a")


def test_under_another_launcher_rank_0_speaks_first_and_who_follows_is_silent(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    slept: list[float] = []
    monkeypatch.setattr(time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    assert leave(ConfigError("no such thing")) == 2
    assert capsys.readouterr().err == "rank 1: error: no such thing\n"
    assert slept == [GRACE_SECONDS]
    assert leave(RankFollowed("rank 0 stopped")) == 1
    assert leave(Interrupted("stopped at step 3")) == 4
    assert capsys.readouterr().err == ""
    assert slept == [GRACE_SECONDS, FOLLOW_SECONDS, TOGETHER_SECONDS]
    assert FOLLOW_SECONDS > GRACE_SECONDS  # who has nothing to say leaves after who has
    assert leave(RankLost("another rank is gone")) == 1
    assert capsys.readouterr().err == "rank 1: error: another rank is gone\n"
    monkeypatch.setenv("RANK", "0")
    assert leave(Interrupted("stopped at step 3")) == 4
    assert capsys.readouterr().err == "stopped at step 3\n"


def test_a_dry_run_and_a_launchers_rank_start_none(monkeypatch: pytest.MonkeyPatch):
    def ranks(*words: str) -> int:
        return ranks_to_start(load_config([*RAN, *words]).config)

    monkeypatch.setattr(supervise, "count_gpus", lambda: 8)
    assert ranks() == 1
    assert ranks("--num_gpus", "3") == 3
    assert ranks("--num_gpus", "all") == ranks("--num_gpus", "0") == 8
    assert ranks("--num_gpus", "3", "--dry_run") == 1
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert ranks("--num_gpus", "3") == 1


def test_a_dry_run_plans_for_the_ranks_that_would_be_started(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "count_gpus", lambda: 8)

    def size(*words: str) -> int:
        return launch.expected_world_size(load_config([*RAN, *words]).config.distributed)

    assert (size(), size("--num_gpus", "3"), size("--num_gpus", "all")) == (1, 3, 8)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert size() == size("--num_gpus", "2") == 2


def test_each_process_needs_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    with pytest.raises(EnvironmentUnsupported, match="4 processes on a machine of which 2 GPUs may be used"):
        launch.this_process()


def test_the_end_of_a_process_is_noticed_before_anybody_waits_for_it():
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        ends = Ends((process.pid,))
        assert not ends.any()
        assert process.stdin is not None
        process.stdin.close()
        until = time.monotonic() + 20
        while not ends.any() and time.monotonic() < until:
            time.sleep(0.02)
        assert ends.any()
        assert process.returncode is None
    assert Ends((process.pid,)).any()


@pytest.fixture
def _ours_first(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers find the project."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", ""))))


@pytest.mark.usefixtures("_ours_first")
@pytest.mark.parametrize(
    ("broken", "sentence"),
    [
        ("copies", "rank 1: error: a copy of known numbers from rank 0 came out wrong on rank 1"),
        ("silence", "error: the 2 ranks do not get through to one another"),
    ],
)
def test_a_machine_that_loses_numbers_is_refused(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, broken: str, sentence: str
):
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 1.0)
    assert run_ranks([sys.executable, str(WORKER), broken], 2) == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith(sentence)


@pytest.mark.usefixtures("_ours_first")
def test_a_rank_that_hangs_leaves_when_another_is_gone(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(supervise, "GRACE_SECONDS", 100.0)  # it ends by itself, not by being killed
    began = time.monotonic()
    assert run_ranks([sys.executable, str(WORKER), "hang"], 2) == 137
    assert time.monotonic() - began < 60
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("rank 1: error: it was ended by SIGKILL")


@pytest.mark.usefixtures("_ours_first")
def test_ranks_whose_starter_is_killed_are_asked_to_stop(tmp_path: Path):
    start = "import sys; from library.distributed.supervise import run_ranks; run_ranks(sys.argv[1:], 2)"
    (told := tmp_path / "told").mkdir()
    words = [sys.executable, "-c", start, sys.executable, str(WORKER), "orphans", str(told)]
    # What a killed process cannot take away is left in a folder that goes with the test.
    with subprocess.Popen(words, env={**os.environ, "TMPDIR": str(tmp_path)}) as process:
        until = time.monotonic() + 60
        while len(list(told.iterdir())) < 2 and time.monotonic() < until:
            time.sleep(0.05)
        ranks = [int(path.name) for path in told.iterdir()]
        assert len(ranks) == 2
        assert not Ends(ranks).any()
        process.kill()
    ends = [Ends((rank,)) for rank in ranks]
    while not all(end.any() for end in ends) and time.monotonic() < until:
        time.sleep(0.05)
    assert all(end.any() for end in ends)
