"""The forecast against what a run then does: every file, every cache entry, every size, every moment."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from flux_train_network import main
from library.config.sections.logging import LoggingConfig
from library.config.sections.saving import SavingConfig
from library.config.train_config import TrainConfig
from library.data.plan import Plan, PlannedImage, PlanSettings
from library.preflight.facts import TrainedFacts
from library.preflight.writes import files_to_write, peak_bytes
from tests.e2e.running import draw_pictures, write_config
from tests.preflight.dry_runs import advice, dry_run

SIZES = [(96, 64), (64, 96), (100, 60), (96, 72)]


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    return path.stat().st_size if path.is_file() else sum(file.stat().st_size for file in path.iterdir())


def test_a_run_does_what_its_dry_run_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    draw_pictures(tmp_path / "data" / "2_waves", SIZES)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("waves --w 64 --h 64 --s 2 --d 3\nmore --w 32 --h 64 --s 2\n", encoding="utf-8")
    output = tmp_path / "out"
    config = write_config(
        tmp_path / "c.toml", tmp_path / "data", output,
        cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True, flip_aug=True, caption_dropout_rate=0.1,
        save_every_n_epochs=1, save_every_n_steps=4, save_last_n_epochs=1, save_state=True, max_train_epochs=3,
        sample_prompts=str(prompts), sample_every_n_epochs=2, sample_at_first=True, validation_split=0.25,
        validate_every_n_steps=4, save_precision="bf16", optimizer_type="AdamW", ema_decay=0.9, keep_best=True,
    )  # fmt: skip
    before = dry_run(config)
    assert not output.exists(), "a dry run writes nothing"
    assert not list((tmp_path / "data" / "2_waves").glob("*.npz"))
    capsys.readouterr()
    assert main(["--config_file", str(config)]) == 0
    said = capsys.readouterr().err

    kept = {
        Path(file["path"]).name: file["bytes"]
        for file in before["files"]
        if file["removed_at"] is None and file["kind"] != "samples"
    }
    there = {path.name: size_of(path) for path in output.iterdir() if path.name != "sample"}
    assert set(kept) == set(there)
    assert there["out.report.html"] < kept["out.report.html"]
    for name, size in there.items():
        assert name == "out.report.html" or kept[name] == pytest.approx(size, abs=80_000), (
            name
        )  # headers, metadata, JSON
    drawn = [file for file in before["files"] if file["kind"] == "samples"]
    assert [file["step"] for file in drawn] == before["schedule"]["sample_steps"]
    for file in drawn:
        pictures = list((output / "sample").glob(Path(file["path"]).name))
        assert len(pictures) == 2
        assert sum(map(size_of, pictures)) < file["bytes"] + 1000
    validated = [int(step) for step in re.findall(r"step (\d+)  validation loss", said)]
    assert validated == before["schedule"]["validation_steps"]
    assert f"{before['trained']['parameters']:,} parameters" in said

    for cache, pattern in zip(before["caches"], ("*_flux.npz", "*_flux_te.npz"), strict=True):
        files = list((tmp_path / "data" / "2_waves").glob(pattern))
        assert cache["to_encode"] == cache["entries"] == len(files)
        written = sum(size for _, size in cache["bytes_by_folder"])
        assert written == pytest.approx(sum(map(size_of, files)), rel=0.25, abs=4000 * len(files))
    after = dry_run(config)
    assert [cache["to_encode"] for cache in after["caches"]] == [0, 0]
    reworded = [notice["text"] for notice in dry_run(config, "--caption_prefix", "new")["notices"]]
    assert any("cached text encoder outputs fit no longer" in text for text in reworded)
    assert not any("cached latents" in text for text in reworded)
    assert f"holds {len(there)} files that the run will replace" in advice(after)["files-replaced"]
    assert "state-newer" not in advice(after), "the newest state is of the whole run"
    done, more = before["plan"]["total_steps"], before["plan"]["steps_per_epoch"] * 5
    assert (
        f"has done {done} of {more} steps"
        in advice(dry_run(config, "--max_train_epochs", "5"))["state-newer"]
    )
    resumed = dry_run(config, "--max_train_epochs", "5", "--resume", "auto")
    assert resumed["plan"]["first_step"] == done
    assert min(file["step"] for file in resumed["files"]) > done
    assert "state-newer" not in advice(resumed)


def test_retention_is_forecast_with_the_peak():
    images = tuple(PlannedImage(f"k{n}", 0, (64, 64), 1) for n in range(4))
    plan = Plan(images, PlanSettings(seed=0, batch_sizes=(1,), units_per_step=1, max_train_epochs=5))
    trained = TrainedFacts((), (), base_parameters=0, network_bytes=10, state_bytes=100)
    saving = SavingConfig(
        output_dir=Path("o"), output_name="n", save_every_n_epochs=1, save_last_n_epochs=2, save_state=True,
        save_last_n_epochs_state=1, no_workflow=True, no_card=True,
    )  # fmt: skip
    silent = LoggingConfig(no_run_log=True, report_every_n_steps=0)
    files = files_to_write(TrainConfig(saving=saving, logging=silent), plan, trained, (), first_step=0)
    removed = {file.path.name: file.removed_at for file in files}
    assert removed == {
        "n-000001.safetensors": 12, "n-000002.safetensors": 16, "n-000003.safetensors": None,
        "n-000004.safetensors": None, "n.safetensors": None, "n-000001-state": 8, "n-000002-state": 12,
        "n-000003-state": 16, "n-000004-state": None, "n-state": None,
    }  # fmt: skip
    # Step 16: models 2 to 4 and states 3 and 4 are there at once; the end: models 3, 4, last and states 4, last.
    assert peak_bytes(files) == 3 * 10 + 2 * 100
    saving = replace(saving, no_workflow=False, no_card=False)
    more = files_to_write(TrainConfig(saving=saving), plan, trained, (), first_step=0)
    beside = {file.path.name: file.removed_at for file in more if file not in files}
    assert beside == {
        "n-000001.workflow.json": 12, "n-000002.workflow.json": 16, "n-000003.workflow.json": None,
        "n-000004.workflow.json": None, "n.workflow.json": None, "n.md": None, "n-log.jsonl": None,
        "n.report.html": None,
    }  # fmt: skip
