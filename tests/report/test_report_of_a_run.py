"""Runs of the tiny model: the report that training leaves, runs compared, contact sheets of what they saved."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from flux_train_network import main
from library.report.page import content_of
from networks import weights
from tests.e2e.running import TINY, draw_pictures, write_config
from tests.report.made import HOSTILE
from tools import compare, grid

PROMPTS = "waves --w 64 --h 64 --s 2 --d 5\nsand </script> --w 96 --h 64 --s 2"
SECRET = "key-that-nobody-may-read"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two runs, "one" with text encoders trained as well."""
    folder = tmp_path_factory.mktemp("runs")
    data = draw_pictures(folder / "data" / "1_waves", [(96, 64), (64, 64), (64, 64), (64, 96)]).parent
    (data / "1_waves" / "picture1.txt").write_text(HOSTILE.replace("\u2028", ""), encoding="utf-8")
    both: dict[str, Any] = {
        "max_train_epochs": None, "max_train_steps": 2, "sample_prompts": PROMPTS, "sample_every_n_steps": 1,
        "sample_at_first": True, "save_every_n_steps": 1, "learning_rate": 1e-2, "wandb_api_key": SECRET,
    }  # fmt: skip
    changes: dict[str, dict[str, Any]] = {
        "one": {"network_train_unet_only": False, "cache_text_encoder_outputs": False},
        "two": {"network_dim": 2, "learning_rate": 1e-3},
    }
    for name, own in changes.items():
        config = write_config(
            folder / f"{name}.toml", data, folder / name, **{**both, "output_name": name, **own}
        )
        assert main(["--config_file", str(config)]) == 0
    return folder


def test_training_leaves_a_whole_report(runs: Path):
    page = runs / "one" / "one.report.html"
    content = content_of(page)
    assert SECRET not in page.read_text(encoding="utf-8")
    assert (content["run"]["status"], content["run"]["step"]) == ("finished", 2)
    assert content["samples"]["steps"] == [0, 1, 2]
    assert [one["text"] for one in content["samples"]["prompts"]] == ["waves", "sand </script>"]
    assert all((page.parent / one["file"]).is_file() for one in content["samples"]["pictures"])
    assert [one["file"] for one in content["checkpoints"]] == [
        "one-step00000001.safetensors",
        "one-step00000002.safetensors",
        "one.safetensors",
    ]
    assert all(one["sha256"] for one in content["checkpoints"])
    captions = [shown["caption"] for bucket in content["data"]["buckets"] for shown in bucket["pictures"]]
    assert sorted(captions)[0].startswith("</script>")
    assert len(captions) == 4
    options = {one["name"]: one for one in content["options"]}
    assert options["wandb_api_key"]["value"] == "***"
    assert options["network_dim"]["source"].startswith("one.toml")
    assert options["seed"]["value"] == "7"
    charts = {chart["title"] for chart in content["charts"]}
    assert {"Loss", "Learning rate", "Gradient norm", "Seconds a step"} <= charts


def test_a_run_may_go_without_a_report(runs: Path, tmp_path: Path):
    config = write_config(
        tmp_path / "c.toml", runs / "data", tmp_path / "out", max_train_epochs=None, max_train_steps=1,
        report_every_n_steps=0,
    )  # fmt: skip
    assert main(["--config_file", str(config)]) == 0
    assert not list((tmp_path / "out").glob("*.html"))


def test_runs_are_compared(runs: Path, tmp_path: Path):
    page = tmp_path / "compare.html"
    assert (
        compare.main([str(runs / "one"), str(runs / "two" / "two.report.html"), "--output", str(page)]) == 0
    )
    runs_shown = content_of(page)["runs"]
    values = [{one["name"]: one["value"] for one in run["options"]} for run in runs_shown]
    assert [value["network_dim"] for value in values] == ["4", "2"]
    assert compare.main([str(tmp_path), "--output", str(page)]) == 2


def test_a_contact_sheet_shows_every_file_at_every_strength(runs: Path, tmp_path: Path):
    foreign = tmp_path / "kohya.safetensors"  # another rank, no alpha, fewer layers, no metadata
    tensors = weights.read(runs / "two" / "two.safetensors")
    chosen = {
        key: value for key, value in tensors.items() if "single_blocks_0" in key and not key.endswith("alpha")
    }
    weights.write(
        foreign, {key: value * 3 for key, value in chosen.items()}, dtype=torch.float16, metadata=None
    )
    report = tmp_path / "one.report.html"
    report.write_bytes((runs / "one" / "one.report.html").read_bytes())
    files = [str(runs / "one" / "one.safetensors"), str(runs / "two" / "two.safetensors"), str(foreign)]
    models = [
        word
        for name in ("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae", "tokenizer_cache_dir")
        for word in (f"--{name}", TINY)
    ]
    code = grid.main([
        *files, "--strengths", "0", "1", "--seeds", "3", "--output", str(tmp_path / "sheet.png"),
        "--html", str(tmp_path / "sheet.html"), "--report", str(report), *models,
        "--sample_prompts", "waves --w 64 --h 64 --s 2",
    ])  # fmt: skip
    assert code == 0
    (sheet,) = content_of(tmp_path / "sheet.html")["sheets"]
    assert sheet["columns"] == ["one", "two", "kohya"]
    assert sheet["rows"] == ["0", "1"]
    base, full = ([cell["src"] for cell in row] for row in sheet["cells"])
    assert len(set(base)) == 1
    assert len({*base, *full}) == 4  # each file draws a picture of its own, after the others were taken off
    assert content_of(report)["sheets"] == [sheet]
    assert content_of(report)["run"]["name"] == "one"
    with Image.open(tmp_path / "sheet.png") as picture:
        assert picture.width > 3 * 192


@pytest.mark.parametrize(("words", "said"), [
    (["nothing.safetensors"], "cannot be found"),
    ([__file__], "no base model"),
    ([__file__, "--pretrained_model_name_or_path", TINY], "no prompts"),
    ([__file__, "--stengths", "1"], "stengths"),
])  # fmt: skip
def test_a_contact_sheet_that_cannot_be_drawn(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
):
    assert grid.main(words) == 2
    assert said in capsys.readouterr().err


def test_the_log_and_the_report_tell_the_same(runs: Path):
    lines = [
        json.loads(text) for text in (runs / "two" / "two-log.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    losses = [line["loss"] for line in lines if line["kind"] == "step"]
    (chart,) = [
        one for one in content_of(runs / "two" / "two.report.html")["charts"] if one["title"] == "Loss"
    ]
    assert chart["series"][0]["y"] == pytest.approx(losses, rel=1e-4)
