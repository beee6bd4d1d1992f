"""Whole runs of LyCORIS's algorithms that copy or replace base weights, alone and with memory options."""

from __future__ import annotations

from pathlib import Path

import pytest

from flux_train_network import main
from networks.readback import read_back
from tests.e2e.running import draw_pictures, write_config


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "1_waves", [(64, 64)] * 2)
    return folder


def lycoris(folder: Path, pictures: Path, arguments: str, **changes: object) -> Path:
    options = {
        "network_module": "lycoris.kohya", "network_args": arguments.split(), "mixed_precision": "bf16",
        "max_train_epochs": None, "max_train_steps": 2, "t5xxl_max_token_length": 20, **changes,
    }  # fmt: skip
    return write_config(folder / "c.toml", pictures, folder / "out", **options)


@pytest.mark.parametrize(
    ("arguments", "changes"),
    [
        ("algo=full", {"scale_weight_norms": 1.0}),
        ("algo=lora dora_wd=True", {"blocks_to_swap": 1, "gradient_checkpointing": True}),
        ("algo=lokr dora_wd=True", {"scale_weight_norms": 1.0}),
    ],
)
def test_an_algorithm_that_reads_base_weights_trains(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], arguments: str,
    changes: dict[str, object],
):  # fmt: skip
    config = lycoris(tmp_path, pictures, arguments, **changes)
    assert main(["--config_file", str(config)]) == 0
    in_vain = "scale_weight_norms: lycoris.kohya has no norms to limit" in " ".join(
        capsys.readouterr().err.split()
    )
    assert in_vain == (arguments == "algo=full")
    report = read_back(tmp_path / "out" / "out.safetensors")
    assert report.num_layers == 32
    assert not report.problems


@pytest.mark.parametrize(
    ("arguments", "changes", "sentence"),
    [
        (
            "algo=full",
            {"blocks_to_swap": 1},
            "error: blocks_to_swap: the network trains the weights of 32 layers",
        ),
        ("algo=full", {"fp8_base": True}, "error: LyCORIS's FullModule rebuilds base weights"),
        ("algo=lora dora_wd=True", {"fp8_base": True}, "error: LyCORIS's LoConModule rebuilds base weights"),
    ],
)
def test_what_cannot_work_together_is_said_before_anything_is_loaded(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str], arguments: str,
    changes: dict[str, object], sentence: str,
):  # fmt: skip
    config = lycoris(tmp_path, pictures, arguments, **changes)
    assert main(["--config_file", str(config), "--dry_run"]) == 2
    assert sentence in capsys.readouterr().err
