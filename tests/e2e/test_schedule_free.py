"""Schedule-free optimizers keep two sets of weights: one is trained, the other used, measured and saved."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from flux_train_network import main
from tests.e2e.running import draw_pictures, write_config

OPTIONS = {
    "optimizer_type": "AdamWScheduleFree", "optimizer_args": ["warmup_steps=2"], "learning_rate": 1e-2,
    "max_train_epochs": None, "max_train_steps": 6, "t5xxl_max_token_length": 16, "train_batch_size": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "1_waves", [(64, 64)] * 4)
    return folder


def trained(folder: Path, pictures: Path, *arguments: str, **changes: object) -> Path:
    folder.mkdir(exist_ok=True)
    config = write_config(folder / "c.toml", pictures, folder / "out", **{**OPTIONS, **changes})
    assert main(["--config_file", str(config), "--console_log_level", "ERROR", *arguments]) == 0
    return folder / "out"


def furthest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key]).abs().max()) for key in first)


def test_saving_sampling_and_validating_leave_no_trace(tmp_path: Path, pictures: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("waves --w 64 --h 64 --s 2 --d 3\n", encoding="utf-8")
    quiet = trained(tmp_path / "quiet", pictures, validation_split=0.25)
    busy = trained(
        tmp_path / "busy", pictures, validation_split=0.25, validate_every_n_steps=1, save_every_n_steps=1,
        save_state=True, sample_prompts=str(prompts), sample_every_n_steps=2, sample_at_first=True,
    )  # fmt: skip
    before = load_file(busy / "out-step00000005.safetensors")
    last = load_file(busy / "out.safetensors")
    assert furthest(load_file(quiet / "out.safetensors"), last) == 0
    assert furthest(before, last) > 1e-4


def test_what_is_saved_is_the_average_and_what_is_resumed_goes_on_from_the_other(
    tmp_path: Path, pictures: Path
):
    whole = trained(tmp_path / "whole", pictures, save_every_n_steps=3, save_state=True)
    state = whole / "out-step00000003-state"
    saved, stored = (
        load_file(whole / "out-step00000003.safetensors"),
        load_file(state / "optimizer.safetensors"),
    )
    network = load_file(state / "model.safetensors")
    # z is where steps are taken to; x, the average, is what the file holds; y between them is what is trained on.
    names = [key.removesuffix("/z") for key in stored if key.endswith("/z")]
    assert names
    x, y = {name: saved[name] for name in names}, {name: network[name] for name in names}
    z = {name: stored[f"{name}/z"] for name in names}
    assert furthest(x, z) > 1e-4
    assert furthest(y, {name: 0.9 * x[name] + 0.1 * z[name] for name in names}) < 1e-6
    resumed = trained(tmp_path / "resumed", pictures, "--resume", str(state))
    assert furthest(load_file(whole / "out.safetensors"), load_file(resumed / "out.safetensors")) == 0
