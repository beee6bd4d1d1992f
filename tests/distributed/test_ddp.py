"""Two ranks under DDP against one process: gradients, parameters, caches, shares of uneven steps."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from library.config.load import load_config
from library.train.prepare import read_data
from tests.e2e.running import ROOT, draw_pictures, run, write_config

WORKER = Path(__file__).parent / "worker.py"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "2_same", [(64, 64)] * 5)
    draw_pictures(folder / "1_wide", [(96, 64)] * 3)
    return folder


def trained_by(folder: Path, data: Path, *, ranks: int, **changes: object) -> list[dict[str, Tensor]]:
    """Each rank's parameters after a run of `ranks` processes."""
    folder.mkdir()
    config = write_config(folder / "c.toml", data, folder / "out", **changes)
    start = [sys.executable]
    if ranks > 1:
        start += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    done = subprocess.run(
        [*start, str(WORKER), str(config), str(folder)], capture_output=True, text=True, timeout=300, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    return [load_file(folder / f"rank{rank}.safetensors") for rank in range(ranks)]


def furthest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def validation_losses(output: Path) -> list[tuple[int, float]]:
    """(step, loss) of each validation of a finished run."""
    state = json.loads((output / "out-state" / "train_state.json").read_text(encoding="utf-8"))
    return [(step, loss) for step, loss in state["validation_losses"]]


def test_one_step_of_two_ranks_has_the_gradients_of_one_process(tmp_path: Path, pictures: Path):
    # Plain SGD with rate 1 and no clipping: what a parameter moved by is its gradient.
    options = {
        "optimizer_type": "SGD", "learning_rate": 1.0, "max_grad_norm": 0.0, "max_train_epochs": None,
        "max_train_steps": 1, "train_data_dir": str(pictures), "gradient_accumulation_steps": 2,
    }  # fmt: skip
    (one,) = trained_by(tmp_path / "one", pictures, ranks=1, train_batch_size=2, **options)
    # The two also keep blocks and activations in main memory, which must not show.
    first, second = trained_by(
        tmp_path / "two", pictures, ranks=2, train_batch_size=1, blocks_to_swap=1,
        cpu_offload_checkpointing=True, ddp_static_graph=True, **options,
    )  # fmt: skip
    (start,) = trained_by(
        tmp_path / "start", pictures, ranks=1, train_batch_size=2, **{**options, "learning_rate": 1e-30}
    )
    assert furthest(one, start) > 1e-3, "the step did nothing, so equality would prove nothing"
    assert furthest(first, second) == 0.0
    assert furthest(first, one) < 1e-6


def test_ranks_hold_the_same_parameters_after_ten_steps(tmp_path: Path, pictures: Path):
    options = {
        "max_train_epochs": None, "max_train_steps": 10, "train_batch_size": 2, "global_batch_size": 4,
        "validate_every_n_steps": 5, "save_state_on_train_end": True,
    }  # fmt: skip
    first, second = trained_by(
        tmp_path / "two", pictures, ranks=2, validation_split=0.2, cache_latents_to_disk=True, **options
    )
    assert furthest(first, second) == 0.0
    # The same global batch on one process: other micro-batches, the same steps, uneven ones included.
    (one,) = trained_by(tmp_path / "one", pictures, ranks=1, validation_split=0.2, **options)
    assert furthest(first, one) < 1e-5
    # Validation losses are reduced over ranks: those of one process.
    there, here = (validation_losses(tmp_path / name / "out") for name in ("two", "one"))
    assert [step for step, _ in there] == [step for step, _ in here]
    assert len(here) > 2
    assert [loss for _, loss in there] == pytest.approx([loss for _, loss in here], rel=1e-5)


def test_the_steps_of_that_run_are_uneven(tmp_path: Path, pictures: Path):
    """The run above trains on short units and short steps, or it would prove less than it says."""
    config = write_config(
        tmp_path / "c.toml", pictures, tmp_path / "out", global_batch_size=4, validation_split=0.2
    )
    plan = read_data(load_config(["--config_file", str(config)]).config, seed=7, world_size=2).plan
    sizes = {plan.step(index).num_samples for index in range(plan.steps_per_epoch)}
    assert len(sizes) > 1


def test_a_run_of_two_ranks_resumes_on_one(tmp_path: Path, pictures: Path):
    options = {"train_batch_size": 1, "global_batch_size": 2, "save_every_n_steps": 3, "save_state": True}
    whole = write_config(tmp_path / "a.toml", pictures, tmp_path / "a", **options)
    run(whole, processes=2)
    state = tmp_path / "a" / "out-step00000003-state"
    cut = write_config(tmp_path / "b.toml", pictures, tmp_path / "b", **options)
    run(cut, "--resume", str(state), processes=1)
    first, second = (load_file(tmp_path / name / "out.safetensors") for name in ("a", "b"))
    assert furthest(first, second) < 1e-5


def test_an_error_on_two_ranks_is_said_once(tmp_path: Path, pictures: Path):
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", network_module="networks.nothing")
    printed = run(config, processes=2, code=1)
    assert printed.stderr.count("error: ") == 1
    assert "networks.nothing" in printed.stderr
