"""A state resumed with options other than its own: taken over where that has a meaning, refused in words elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flux_train_network import main
from tests.e2e.running import draw_pictures, write_config

OPTIONS = {
    "max_train_epochs": 4,
    "train_batch_size": 1,
    "t5xxl_max_token_length": 16,
    "lr_scheduler": "cosine",
}


@pytest.fixture(scope="module")
def cut(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The pictures, and the state of a run of 16 steps after 8."""
    folder = tmp_path_factory.mktemp("cut")
    pictures = draw_pictures(folder / "data" / "1_waves", [(64, 64)] * 4).parent
    config = write_config(
        folder / "c.toml", pictures, folder / "out", save_every_n_epochs=2, save_state=True, **OPTIONS
    )
    assert main(["--config_file", str(config)]) == 0
    return pictures, folder / "out" / "out-000002-state"


def resume(folder: Path, cut: tuple[Path, Path], **changes: object) -> int:
    pictures, state = cut
    options = {**OPTIONS, "save_state_on_train_end": True, **changes}
    config = write_config(folder / "c.toml", pictures, folder / "out", **options)
    return main(["--config_file", str(config), "--resume", str(state)])


def test_with_another_batch_size_the_schedule_ends_where_the_run_does(
    tmp_path: Path, cut: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    assert resume(tmp_path, cut, train_batch_size=2) == 0
    assert "going on 2.00 epochs in, at step 4" in " ".join(capsys.readouterr().err.split())
    state = json.loads((tmp_path / "out" / "out-state" / "train_state.json").read_text())
    assert state["step"] == 8
    groups = dict(state["optimizer"]["groups"]["unet"]["pairs"])
    assert groups["lr"] == pytest.approx(0.0, abs=1e-9)  # a cosine ends at 0


def test_another_learning_rate_is_said_to_be_kept(
    tmp_path: Path, cut: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
):
    assert resume(tmp_path, cut, learning_rate=5e-4) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert "the learning rates of the saved run go on (unet 0.001), not those given now (unet 0.0005)" in said


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"network_dim": 8}, "resume with the same network_module, network_dim and network_args"),
        ({"optimizer_type": "Lion"}, "resume with the same optimizer_type"),
        (
            {"mixed_precision": "bf16", "full_bf16": True},
            "resume with the full_bf16 or full_fp16 that it had",
        ),
    ],
)
def test_what_does_not_fit_the_state_is_one_sentence(
    tmp_path: Path, cut: tuple[Path, Path], capsys: pytest.CaptureFixture[str], changes: dict[str, object],
    sentence: str,
):  # fmt: skip
    assert resume(tmp_path, cut, **changes) == 2
    assert sentence in capsys.readouterr().err
