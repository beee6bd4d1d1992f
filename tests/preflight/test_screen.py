"""What people see: a dry run at several widths and piped, the progress bar, the last line of a failing run."""

from __future__ import annotations

import io
import json
import re
import sys
from pathlib import Path

import pytest
from rich.console import Console

from flux_train_network import main
from library.config.load import load_config
from library.preflight.options_table import place_text, show_options
from library.train.progress import ProgressListener
from library.train.state import TrainState
from library.train.trainer import StepReport
from tests.e2e.running import draw_pictures, write_config

LONG = "a_folder_with_a_name_that_is_longer_than_any_column_of_a_table_can_be_made_on_a_small_screen"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    draw_pictures(tmp_path / "data" / "2_waves", [(96, 64), (64, 96), (80, 80)])
    return write_config(
        tmp_path / "c.toml", tmp_path / "data", tmp_path / LONG, lr_scheduler="cosine", xformers=True,
        sample_prompts="waves --w 64 --h 64\nmore", sample_every_n_epochs=1,
    )  # fmt: skip


@pytest.mark.parametrize("width", [80, 100, 160])
def test_options_keep_their_values_whole_at_any_width(config: Path, width: int):
    screen = io.StringIO()
    loaded = load_config(["--config_file", str(config)])
    show_options(loaded, Console(file=screen, width=width, force_terminal=True, color_system=None))
    lines = screen.getvalue().splitlines()
    (line,) = [line for line in lines if "output_dir" in line]
    assert str(config.parent / LONG) in line
    assert any("c.toml:" in line for line in lines)
    assert any("the rate runs by cosine over the whole run" in line for line in lines)
    assert any("none: `attention` chooses" in line for line in lines)


def test_sources_are_short():
    assert place_text("train.toml [model] line 7") == "train.toml:7"
    assert place_text("train.toml line 7") == "train.toml:7"
    assert place_text("implied by cache_latents_to_disk") == "implied by cache_latents_to_disk"


def test_a_dry_run_is_one_line_a_row_when_piped(config: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--config_file", str(config), "--dry_run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert not [line for line in lines if line != line.rstrip()]
    (option,) = [line for line in lines if line.split()[:1] == ["output_dir"]]
    assert option.split()[1:3] == [str(config.parent / LONG), re.search(r"c.toml:\d+", option)[0]]
    assert [line for line in lines if line and not line.startswith(" ")] == [
        "Options", "Folders", "Buckets of an epoch", "Plan", "Trained", "Caches", "Files", "Beside training",
        "Advice", "Nothing was loaded, trained or written.",
    ]  # fmt: skip
    assert any(re.match(r"    2_waves +\"waves, number 0\"$", line) for line in lines)


def test_json_goes_to_the_screen_alone(config: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["--config_file", str(config), "--dry_run_json", "-"]) == 0
    report = json.loads(capsys.readouterr().out)
    options = {option["name"]: option for option in report["options"]}
    assert options["resolution"]["value"] == [64, 64]
    assert options["dry_run"]["source"] == "implied by dry_run_json"
    assert report["plan"]["total_steps"] == 2 * report["plan"]["steps_per_epoch"]
    assert main(["--config_file", str(config), "--dry_run_json", str(config / "x.json")]) == 2
    assert "dry_run_json" in capsys.readouterr().err


def test_the_bar_shows_speed_loss_and_time_left():
    screen = io.StringIO()
    console = Console(file=screen, width=100, force_terminal=True, color_system=None)
    bar = ProgressListener(console=console, total_steps=8, num_epochs=2)
    state = TrainState(step=0, seed=1, steps_per_epoch=4, plan_fingerprint="", session_id=0, started_at=0.0)
    bar.on_start(state)
    for _ in range(6):
        state = state.after_step(loss=0.25, samples=2)
        report = StepReport(
            loss=0.25, grad_norm=1.0, learning_rates={}, samples=2, seconds=0.5, skipped=False
        )
        bar.on_step(state, report)
    bar.on_end(state)
    frames = [
        re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", frame) for frame in re.split(r"[\r\n]", screen.getvalue())
    ]
    last = [frame for frame in frames if frame.strip()][-1]
    assert "6/8 epoch 2/2  avr_loss=0.2500  0.50 s/step  4.0 img/s" in last
    assert len(last) <= 100


@pytest.mark.parametrize(
    ("what", "code", "last"),
    [
        (
            "raise RuntimeError('two\\nlines')",
            1,
            "error: RuntimeError: two lines; the lines above show where",
        ),
        ("raise KeyboardInterrupt", 130, "stopped before training began; caches made so far are kept"),
        (None, 2, "error: network_module broken_for_test lacks create_network"),
    ],
)
def test_a_failing_run_ends_with_one_sentence(
    config: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    what: str | None,
    code: int,
    last: str,
):
    more = "def create_network_from_weights(*_, **__):\n    pass\n"
    text = f"def create_network(*_, **__):\n    {what}\n" if what else ""
    (config.parent / "broken_for_test.py").write_text(text + more, encoding="utf-8")
    monkeypatch.syspath_prepend(config.parent)
    sys.modules.pop("broken_for_test", None)
    assert main(["--config_file", str(config), "--network_module", "broken_for_test"]) == code
    assert capsys.readouterr().err.rstrip("\n").splitlines()[-1].startswith(last)
