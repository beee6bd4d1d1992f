"""`--num_gpus 2` with real processes: it trains what one process trains, and ends as docs/distributed.md says.

Faults come from a network plug-in (failing_network.py) that fails on one rank at one step.
"""

from __future__ import annotations

import os
import signal
import subprocess
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file

from flux_train_network import main
from tests.e2e.running import ROOT, command, draw_pictures, write_config

PATIENCE = 30.0  # seconds within which the other ranks must be gone
STEP = "INFO step"


class Ended(NamedTuple):
    code: int
    lines: list[str]  # of the screen
    seconds: float  # since the fault


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "2_same", [(64, 64)] * 4)
    return folder


def config(folder: Path, data: Path, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    options = {
        "global_batch_size": 2, "train_batch_size": 1, "t5xxl_max_token_length": 32, "network_dim": 2,
        "cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True, "max_train_epochs": None,
        "max_train_steps": 6,
    }  # fmt: skip
    return write_config(folder / "c.toml", data, folder / "out", **{**options, **changes})


def faulty(folder: Path, data: Path, fault: str, *, rank: int, at: int, **changes: object) -> Path:
    """A config under which one rank fails at one step, once."""
    given = {"fault": fault, "at": at, "rank": rank, "marker": folder / "failed"}
    return config(
        folder, data, network_module="tests.e2e.failing_network",
        network_args=[f"{name}={value}" for name, value in given.items()], **changes,
    )  # fmt: skip


def start(path: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(path, "--num_gpus", "2"), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, cwd=ROOT,
        env={**os.environ, "COLUMNS": "200"}, start_new_session=True,
    )  # fmt: skip


def ended(process: subprocess.Popen[str], lines: list[str], since: float) -> Ended:
    """What came of a run: all of its processes are gone."""
    assert process.stderr is not None
    lines += process.stderr.read().splitlines()
    code = process.wait(timeout=PATIENCE)
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return Ended(code, lines, time.time() - since)


def run_with_fault(path: Path) -> Ended:
    process = start(path)
    assert process.stderr is not None
    lines = process.stderr.read().splitlines()  # to its end: no process holds it any more
    return ended(process, lines, (path.parent / "failed").stat().st_mtime)


def said_once(run: Ended, sentence: str, code: int) -> None:
    assert run.code == code, run.lines
    assert run.lines[-1].startswith(sentence), run.lines
    errors = [line for line in run.lines if "error" in line.lower() and "what is done" not in line]
    assert len(errors) == 1, run.lines
    assert run.seconds < PATIENCE


def test_two_ranks_train_what_one_process_trains(tmp_path: Path, pictures: Path):
    run = ended(start(config(tmp_path / "two", pictures)), [], time.time())
    assert run.code == 0, run.lines
    (checked,) = [line for line in run.lines if "preflight" in line]
    assert "2 x cpu, sums, broadcasts and copies arrive right" in checked
    assert main(["--config_file", str(config(tmp_path / "one", pictures))]) == 0
    two, one = (load_file(tmp_path / name / "out" / "out.safetensors") for name in ("two", "one"))
    assert one.keys() == two.keys()
    assert max(float((one[name] - two[name]).abs().max()) for name in one) < 1e-5
    assert max(float(one[name].abs().max()) for name in one if "lora_up" in name) > 1e-3


@pytest.mark.parametrize(
    ("fault", "rank", "code", "sentence"),
    [
        ("kill", 0, 137, "error: it was ended by SIGKILL (the system does that when main memory runs out"),
        ("memory", 1, 6, "rank 1: error: the GPU's memory ran out (CUDA out of memory)"),
        ("config", 1, 2, "rank 1: error: network_args: this rank alone has something against it"),
    ],
)
def test_a_rank_that_fails_takes_the_others_along_and_has_the_last_word(
    tmp_path: Path, pictures: Path, fault: str, rank: int, code: int, sentence: str
):
    run = run_with_fault(faulty(tmp_path, pictures, fault, rank=rank, at=2))
    said_once(run, sentence, code)


@pytest.mark.parametrize("whom", ["launcher", "rank 1"])
def test_a_stop_signal_saves_one_state(tmp_path: Path, pictures: Path, whom: str):
    steps = 500
    if whom == "rank 1":
        run = run_with_fault(faulty(tmp_path, pictures, "stop", rank=1, at=3, max_train_steps=steps))
    else:
        process, lines = start(config(tmp_path, pictures, max_train_steps=steps)), []
        assert process.stderr is not None
        for line in process.stderr:
            lines.append(line)
            if STEP in line:
                break
        process.send_signal(signal.SIGTERM)
        run = ended(process, lines, time.time())
    assert run.code == 4, run.lines
    (state,) = (tmp_path / "out").glob("*-state")
    step = int(state.name.removeprefix("out-step").removesuffix("-state"))
    assert (
        run.lines[-1]
        == f"stopped at step {step} of {steps}; the state is in {state}, go on with --resume auto"
    )
    assert run.seconds < PATIENCE


def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path: Path, pictures: Path):
    path = faulty(tmp_path, pictures, "nan", rank=1, at=4)
    state = tmp_path / "out" / "out-step00000003-state"
    run = run_with_fault(path)
    said_once(run, "error: step 4: the loss is nan", 3)
    assert run.lines[-1].endswith(f"the state before it is in {state}")
    assert main(["--config_file", str(path), "--resume", "auto"]) == 0
    assert (tmp_path / "out" / "out.safetensors").is_file()
