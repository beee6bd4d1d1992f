"""Which validation is the best, when it is enough, and what a run does about it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from flux_train_network import main
from library.config.sections.validation import ValidationConfig
from library.train.best import has_stalled, is_best, lowest, without_improvement
from library.train.run_log import Ended, Saved, Validated, read_log
from tests.e2e.running import draw_pictures, write_config

FIRST = (0, 0.1)  # before training: the lowest of all, and none of those that count
CURVE = [FIRST, (5, 0.9), (10, 0.7), (15, 0.75), (20, 0.69), (25, 0.69), (30, 0.685), (35, 0.8)]


def test_the_best_is_found_along_a_curve():
    best = [length for length in range(1, len(CURVE) + 1) if is_best(CURVE[:length])]
    assert [CURVE[length - 1][0] for length in best] == [5, 10, 20, 30]  # equal at 25 is no better
    assert lowest(CURVE) == (30, 0.685)
    assert lowest(CURVE[:1]) is None
    assert lowest([FIRST, (5, float("nan")), (10, 2.0)]) == (10, 2.0)
    assert not is_best([FIRST, (5, float("nan"))])


@pytest.mark.parametrize(("patience", "delta", "ends_at"), [
    (1, 0.0, 15), (2, 0.0, None), (2, 0.02, 20), (3, 0.02, 25), (4, 0.02, 30), (5, 0.02, 35), (None, 0.0, None),
])  # fmt: skip
def test_a_run_ends_at_the_right_validation(patience: int | None, delta: float, ends_at: int | None):
    config = ValidationConfig(early_stop_patience=patience, early_stop_min_delta=delta)
    stalled = (step for n, (step, _) in enumerate(CURVE) if has_stalled(CURVE[: n + 1], config))
    assert next(stalled, None) == ends_at


def test_small_steps_down_count_together():
    slow = [FIRST, *((step, 1.0 - 0.01 * step) for step in range(1, 9))]
    # Each is 0.01 below the one before, and every third more than 0.02 below the last that counted.
    assert without_improvement(slow, min_delta=0.025) == 1
    assert without_improvement(slow, min_delta=0.5) == 7


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "1_waves", [(64, 64)] * 8)
    return folder


def losses_of(output: Path) -> list[tuple[int, float]]:
    state = json.loads((output / "out-state" / "train_state.json").read_text(encoding="utf-8"))
    return [(step, loss) for step, loss in state["validation_losses"]]


def test_a_run_keeps_its_best_and_ends_when_it_gets_no_better(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    """A rate that overshoots: the loss falls at first and then only rises."""
    options = {
        "validation_split": 0.25, "validate_every_n_steps": 1, "keep_best": True, "early_stop_patience": 3,
        "learning_rate": 0.1, "max_train_epochs": None, "max_train_steps": 24, "save_every_n_steps": 2,
        "save_last_n_steps": 2, "save_state_on_train_end": True, "t5xxl_max_token_length": 16,
    }  # fmt: skip
    output = tmp_path / "out"
    config = write_config(tmp_path / "c.toml", pictures, output, **options)
    assert main(["--config_file", str(config)]) == 0
    said = capsys.readouterr().err
    losses = losses_of(output)
    best = min(losses[1:], key=lambda pair: pair[1])
    last = losses[-1][0]
    assert last < 24
    assert last - best[0] == 3
    assert f"early stop at step {last}: the validation loss has not fallen in early_stop_patience = 3" in said
    assert f"the lowest was {best[1]:.4f} at step {best[0]}" in said
    with safe_open(output / "out-best.safetensors", framework="pt") as file:
        assert file.metadata()["ss_steps"] == str(best[0])
    with safe_open(output / "out.safetensors", framework="pt") as file:
        assert file.metadata()["ss_steps"] == str(last)
        assert file.metadata()["ss_epoch"] == str(-(-last // 3))
    assert load_file(output / "out-best.safetensors").keys() == load_file(output / "out.safetensors").keys()

    log = [line.record for line in read_log(output / "out-log.jsonl")]
    assert [(r.step, r.loss) for r in log if isinstance(r, Validated)] == losses
    assert [r.step for r in log if isinstance(r, Saved) and r.what == "best"] == [
        r.step for r in log if isinstance(r, Validated) and r.best
    ]
    assert isinstance(log[-1], Ended)
    assert log[-1].why == "early stop"

    # It has ended, also for a resume; with more patience it goes on.
    assert main(["--config_file", str(config), "--resume", "auto"]) == 0
    assert "as its validation loss no longer fell, so nothing is left to do" in capsys.readouterr().err
    more = ["--resume", "auto", "--early_stop_patience", "4"]
    assert main(["--config_file", str(config), *more]) == 0
    assert losses_of(output)[: len(losses)] == losses
    assert losses_of(output)[-1][0] > last


@pytest.mark.parametrize("option", ["keep_best", "early_stop_patience"])
def test_without_validation_nothing_can_be_judged(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], option: str
):
    config = write_config(
        tmp_path / "c.toml", pictures, tmp_path / "out", **{option: 1 if "stop" in option else True}
    )
    assert main(["--config_file", str(config)]) == 2
    assert f"{option} goes by the validation loss" in capsys.readouterr().err
