"""What lies beside training: uploads and states from the Hub, states of sd-scripts, the data on contact sheets."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flux_train_network import main
from tests.e2e.running import draw_pictures, write_config
from tests.files.hub_server import TOKEN, point_client_at, running_hub

SIZES = [(96, 64), (64, 96), (80, 80), (100, 60)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "1_waves", SIZES)
    return folder


def test_what_is_uploaded_can_be_resumed_elsewhere(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    options = {
        "save_every_n_epochs": 1, "save_state": True, "max_train_epochs": 2,
        "logging_dir": str(tmp_path / "logs"), "log_config": True, "scale_weight_norms": 1.0,
        "huggingface_repo_id": "me/lora", "huggingface_path_in_repo": "runs", "huggingface_token": TOKEN,
        "save_state_to_huggingface": True, "async_upload": True, "sample_every_n_epochs": 1,
        "sample_prompts": "waves --w 64 --h 64 --s 1 --d 3",
    }  # fmt: skip
    config = write_config(tmp_path / "a.toml", pictures, tmp_path / "a", **options)
    with running_hub() as hub:
        point_client_at(hub, monkeypatch, tmp_path)
        assert main(["--config_file", str(config)]) == 0
        assert {path.split("/", 3)[3] for path in hub.files if path.count("/") == 3} == {
            "out-000001.safetensors", "out-000001.workflow.json", "out.safetensors", "out.workflow.json", "README.md",
        }  # fmt: skip
        page = hub.files["me/lora/runs/README.md"].decode()
        assert page == (tmp_path / "a" / "out.md").read_text(encoding="utf-8")
        (shown,) = re.findall(r"!\[picture 1\]\((.+?)\)", page)
        assert hub.files[f"me/lora/runs/{shown}"] == (tmp_path / "a" / shown).read_bytes()
        uploaded = hub.files["me/lora/runs/out.safetensors"]
        assert uploaded == (tmp_path / "a" / "out.safetensors").read_bytes()
        states = {path.split("/")[3] for path in hub.files if path.count("/") == 4} - {"sample"}
        assert states == {"out-000001-state", "out-state"}
        again = write_config(
            tmp_path / "b.toml", pictures, tmp_path / "b", max_train_epochs=2, scale_weight_norms=1.0
        )
        keys = [
            "--resume_from_huggingface",
            "--resume",
            "me/lora/runs/out-000001-state",
            "--huggingface_token",
            TOKEN,
        ]
        assert main(["--config_file", str(again), *keys]) == 0
        hub.down = True
        printed = capsys.readouterr().err
        assert (
            main(
                ["--config_file", str(config), "--max_train_epochs", "1", "--output_dir", str(tmp_path / "c")]
            )
            == 0
        )
        failed = capsys.readouterr().err
    first, second = (load_file(tmp_path / name / "out.safetensors") for name in ("a", "b"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert "out.safetensors could not be uploaded to me/lora" in failed
    assert (tmp_path / "c" / "out.safetensors").is_file()
    assert TOKEN not in printed + failed
    written = [p for name in ("a", "b", "logs") for p in (tmp_path / name).rglob("*") if p.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
    events = EventAccumulator(str(next((tmp_path / "logs").glob("*/network_train")))).Reload()
    assert {"max_norm/keys_scaled", "max_norm/max_key_norm", "norm/avg_key_norm"} <= set(
        events.Tags()["scalars"]
    )


def test_the_best_of_the_run_before_it_was_resumed_is_uploaded_with_the_result(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
):
    options = {
        "max_train_epochs": None, "max_train_steps": 2, "learning_rate": 1e-20, "validation_split": 0.25,
        "validate_every_n_steps": 2, "keep_best": True, "save_state": True, "save_every_n_steps": 2,
    }  # fmt: skip
    with running_hub() as hub:
        point_client_at(hub, monkeypatch, tmp_path)
        first = write_config(tmp_path / "a.toml", pictures, tmp_path / "out", **options)
        assert main(["--config_file", str(first)]) == 0
        best = (tmp_path / "out" / "out-best.safetensors").read_bytes()
        more = {**options, "max_train_steps": 3, "huggingface_repo_id": "me/best", "huggingface_token": TOKEN}
        again = write_config(tmp_path / "b.toml", pictures, tmp_path / "out", **more)
        assert main(["--config_file", str(again), "--resume", "auto"]) == 0
        assert hub.files["me/best/out-best.safetensors"] == best
        assert "me/best/out-best.workflow.json" in hub.files


def test_a_missing_token_is_said_before_anything_is_read(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", huggingface_repo_id="me/lora")
    with running_hub() as hub:
        point_client_at(hub, monkeypatch, tmp_path)
        assert main(["--config_file", str(config)]) == 2
        assert "hf auth login" in capsys.readouterr().err
        assert main(["--config_file", str(config), "--huggingface_token", "hf_wrong"]) == 2
        printed = capsys.readouterr().err
    assert "refuses the token" in printed
    assert "hf_wrong" not in printed
    assert "to encode" not in printed


def test_a_state_of_sd_scripts_goes_on_as_its_sentence_says(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", max_train_epochs=1)
    assert main(["--config_file", str(config)]) == 0
    state = tmp_path / "kohya-000001-state"
    state.mkdir()
    shutil.copy(tmp_path / "out" / "out.safetensors", state / "model.safetensors")
    for name in ("optimizer.bin", "scheduler.bin", "random_states_0.pkl"):
        (state / name).write_bytes(b"pickled")
    (state / "train_state.json").write_text('{"current_epoch": 1, "current_step": 3}')
    capsys.readouterr()
    arguments = ["--config_file", str(config), "--max_train_epochs", "2"]
    assert main([*arguments, "--resume", str(state)]) == 2
    printed = capsys.readouterr().err
    weights, step = re.findall(r'network_weights = "(.+)" and initial_step = (\d+)$', printed.strip())[0]
    assert main([*arguments, "--network_weights", weights, "--initial_step", step]) == 0
    assert "traceback" not in capsys.readouterr().err.lower()
    with safe_open(tmp_path / "out" / "out.safetensors", framework="pt") as file:
        assert file.metadata()["ss_epoch"] == "2"


def test_debug_dataset_shows_what_the_model_would_see(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    masks = tmp_path / "masks" / "1_waves"
    masks.mkdir(parents=True)
    for number, (width, height) in enumerate(SIZES):
        half = np.zeros((height, width), np.uint8)
        half[:, : width // 2] = 255
        Image.fromarray(half).save(masks / f"picture{number}.png")
    config = write_config(
        tmp_path / "c.toml", pictures, tmp_path / "out", flip_aug=True, masked_loss=True,
        conditioning_data_dir=str(tmp_path / "masks"), debug_dataset=True, caption_prefix="a picture of",
        pretrained_model_name_or_path="not there", ae=None, clip_l=None, t5xxl=None, enable_bucket=False,
        train_batch_size=3, seed=3,
    )  # fmt: skip
    assert main(["--config_file", str(config)]) == 0
    printed = capsys.readouterr().out
    assert "dataset 1, bucket 64x64: 4 samples" in printed
    lines = [line for line in printed.splitlines() if "picture0.png" in line]
    assert len(lines) == 1
    assert "96x64 -> 96x64  crop 16,0,80,64" in lines[0]
    assert lines[0].endswith('masked  "a picture of waves, number 0"')
    shown = re.findall(r"picture(\d)\.png.*?(flipped)?  masked", printed)
    assert len(shown) == 4
    assert {bool(flipped) for _, flipped in shown} == {True, False}
    (path,) = (tmp_path / "out" / "debug_dataset").iterdir()
    assert path.name == "dataset1_0064x0064_001.png"
    sheet = np.asarray(Image.open(path))
    for place, (number, flipped) in enumerate(shown):
        tile = sheet[12:76, 12 + place * 76 : 76 + place * 76]
        hidden, seen = (tile[:, :24], tile[:, 40:]) if flipped else (tile[:, 40:], tile[:, :24])
        assert np.ptp(hidden) < 3, f"picture {number}: the mask hides one half from the loss"
        assert np.ptp(seen) > 100
    whole = np.asarray(Image.open(pictures / "1_waves" / "picture0.png"))[:, 16:80]
    place, flipped = next((i, bool(f)) for i, (number, f) in enumerate(shown) if number == "0")
    tile = sheet[12:76, 12 + place * 76 : 76 + place * 76]
    seen = tile[:, ::-1] if flipped else tile
    assert np.array_equal(seen[:, :32], whole[:, :32])
    assert np.ptp(sheet[78:100]) > 100, "captions stand below"


def test_masks_lie_in_folders_of_the_images_names(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "masks").mkdir()
    shutil.copytree(pictures, tmp_path / "data")
    draw_pictures(tmp_path / "data" / "1_more", SIZES[:1])
    config = write_config(
        tmp_path / "c.toml", tmp_path / "data", tmp_path / "out", masked_loss=True,
        conditioning_data_dir=str(tmp_path / "masks"), debug_dataset=True,
    )  # fmt: skip
    assert main(["--config_file", str(config)]) == 2
    assert "lacks 1_more, 1_waves: put the masks into folders named as those" in capsys.readouterr().err
