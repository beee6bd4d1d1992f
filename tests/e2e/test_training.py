"""Whole runs of the real command: what is written, exact resume, errors, the dry run."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flux_train_network import main
from library.train.run_log import Ended, read_log
from tests.e2e.running import ROOT, draw_pictures, run, run_until, write_config

SIZES = [(96, 64), (64, 96), (80, 80), (100, 60), (64, 64), (96, 72)]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "2_waves", SIZES)
    return folder


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("# drawn at each epoch\nwaves --w 64 --h 64 --s 2 --d 3\n", encoding="utf-8")
    return path


def test_a_run_writes_what_kohya_writes(tmp_path: Path, pictures: Path, prompts: Path):
    output = tmp_path / "out"
    config = write_config(
        tmp_path / "c.toml", pictures, output,
        cache_latents_to_disk=True, cache_text_encoder_outputs_to_disk=True, save_every_n_epochs=1,
        max_train_epochs=3, save_last_n_epochs=1, save_state=True, sample_prompts=str(prompts),
        sample_every_n_epochs=1, logging_dir=str(tmp_path / "logs"), validation_split=0.2,
        save_precision="bf16",
    )  # fmt: skip
    printed = run(config).stderr
    names = sorted(path.name for path in output.iterdir())
    # Six pictures, one held back: five, twice each, in batches of two within a bucket.
    ours = ["out-000002.workflow.json", "out-log.jsonl", "out.md", "out.report.html", "out.workflow.json"]
    kohyas = ["out-000002-state", "out-000002.safetensors", "out-state", "out.safetensors", "sample"]
    assert names == sorted(kohyas + ours)
    samples = sorted(path.name for path in (output / "sample").iterdir())
    assert [re.sub(r"_\d{14}_", "_TIME_", name) for name in samples] == [
        f"out_e{epoch:06d}_00_TIME_3.png" for epoch in (1, 2, 3)
    ]
    with safe_open(output / "out.safetensors", framework="pt") as file:
        metadata, keys = file.metadata(), set(file.keys())
        assert file.get_tensor("lora_unet_single_blocks_0_linear1.lora_up.weight").dtype == torch.bfloat16
        assert float(file.get_tensor("lora_unet_single_blocks_0_linear1.alpha")) == 4.0
    assert "lora_unet_double_blocks_1_txt_attn_qkv.lora_down.weight" in keys
    assert not any(key.startswith("lora_te") for key in keys)
    assert metadata["ss_num_epochs"] == metadata["ss_epoch"] == "3"
    assert metadata["ss_steps"] == metadata["ss_max_train_steps"]
    assert metadata["ss_num_train_images"] == "10"
    assert metadata["ss_num_validation_images"] == "1"
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert re.fullmatch("[0-9a-f]{64}", metadata["sshs_model_hash"])
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_waves": {"n_repeats": 2, "img_count": 5}}
    caches = {path.name for path in (pictures / "2_waves").glob("*.npz")}
    assert {"picture0_0096x0064_flux.npz", "picture0_flux_te.npz"} <= caches
    (events,) = (tmp_path / "logs").glob("*/network_train")
    tags = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"loss/current", "loss/average", "loss/epoch_average", "lr/unet"} <= set(tags)
    assert "mean of the last 20 %" in printed
    assert "open out.workflow.json" in printed
    assert printed.count("read back: ") == 1, "said of the first file alone"
    assert "layers under names that ComfyUI, Forge and diffusers load, all numbers finite" in printed
    assert "0 of 6 to encode" in run(config, "--max_train_epochs", "1").stderr  # the caches hold


def test_killed_and_resumed_ends_with_the_same_bits(tmp_path: Path, pictures: Path):
    options = {"save_every_n_steps": 2, "save_state": True, "max_train_epochs": 3, "network_dropout": 0.1}
    whole = write_config(tmp_path / "a.toml", pictures, tmp_path / "a", **options)
    run(whole)
    cut = write_config(tmp_path / "b.toml", pictures, tmp_path / "b", **options)
    code = run_until(cut, "out-step00000004-state", signal.SIGKILL)
    assert code == -signal.SIGKILL
    assert not (tmp_path / "b" / "out.safetensors").exists()
    printed = run(cut, "--resume", "auto").stderr
    assert "resuming from" in printed
    first, second = (load_file(tmp_path / name / "out.safetensors") for name in ("a", "b"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_finished_run_has_nothing_left_to_do(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", save_state_on_train_end=True)
    assert main(["--config_file", str(config)]) == 0
    assert main(["--config_file", str(config), "--resume", "auto"]) == 0
    assert "nothing is left to do" in capsys.readouterr().err
    # Killed between the last state and the file: the file is all that is missing.
    whole = load_file(tmp_path / "out" / "out.safetensors")
    (tmp_path / "out" / "out.safetensors").unlink()
    assert main(["--config_file", str(config), "--resume", "auto"]) == 0
    again = load_file(tmp_path / "out" / "out.safetensors")
    assert all(torch.equal(again[key], tensor) for key, tensor in whole.items())
    # A longer run goes on from there.
    assert main(["--config_file", str(config), "--resume", "auto", "--max_train_epochs", "3"]) == 0
    with safe_open(tmp_path / "out" / "out.safetensors", framework="pt") as file:
        assert file.metadata()["ss_epoch"] == "3"


def test_a_loss_that_is_not_finite_stops_the_run(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    options = {"optimizer_type": "SGD", "learning_rate": 1e30, "max_grad_norm": 0.0}
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", **options)
    assert main(["--config_file", str(config)]) == 3
    assert "stopped before this update" in capsys.readouterr().err


@pytest.mark.parametrize(("number", "workers"), [(signal.SIGINT, 2), (signal.SIGTERM, 0)])
def test_a_signal_saves_the_state_and_says_how_to_go_on(
    tmp_path: Path, pictures: Path, number: signal.Signals, workers: int
):
    config = write_config(
        tmp_path / "c.toml",
        pictures,
        tmp_path / "out",
        max_train_epochs=200,
        max_data_loader_n_workers=workers,
    )
    assert run_until(config, "step 1/", number) == 4
    (state,) = (tmp_path / "out").glob("out-step*-state")
    done = json.loads((state / "train_state.json").read_text())["step"]
    assert state.name == f"out-step{done:08d}-state"
    end = read_log(tmp_path / "out" / "out-log.jsonl")[-1].record
    assert isinstance(end, Ended)
    assert (end.step, end.why) == (done, "stopped")


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"learning_rate": None, "learing_rate": 1e-3}, "did you mean 'learning_rate'"),
        ({"ae": "{tiny}/clip_l.safetensors"}, "is a CLIP-L text encoder; give it as --clip_l"),
        ({"t5xxl": "{data}/nothing.safetensors"}, "does not exist"),
        ({"train_data_dir": "{empty}"}, "no image"),
        ({"network_module": "networks.lora"}, "networks.lora_flux"),
        ({"optimizer_type": "AdamV"}, "did you mean Adam"),
        ({"network_args": ["train_blocks=sinlge"]}, "train_blocks"),
        ({"resume": "{data}"}, "not a whole state"),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 5}, "constant_with_warmup"),
        ({"cache_latents": True, "color_aug": True}, "color_aug"),
        ({"blocks_to_swap": 2}, "2 double and 4 single blocks: give at most 1"),
        ({"attention": "flash4"}, "attention = flash4 needs an NVIDIA GPU: without it, use attention = auto"),
    ],
)
def test_what_cannot_be_used_is_one_sentence(
    tmp_path: Path, pictures: Path, changes: dict[str, object], said: str, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "empty" / "1_x").mkdir(parents=True)
    tiny = Path(os.environ["POLYRANK_CACHE"]) / "tiny-flux-v2"
    places = {"data": str(pictures), "empty": str(tmp_path / "empty"), "tiny": str(tiny)}
    filled = {
        key: value.format(**places) if isinstance(value, str) else value for key, value in changes.items()
    }
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", **filled)
    capsys.readouterr()
    assert main(["--config_file", str(config)]) == 2
    printed = capsys.readouterr().err
    (line,) = [line for line in printed.splitlines() if line.startswith("error:")]
    assert said in line
    assert "to encode" not in printed, "said before anything large is read"
    assert not (tmp_path / "out").exists()


def test_a_schedule_that_cannot_work_is_refused_before_a_model_is_read(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", lr_scheduler="cosine_with_min_lr")
    for arguments in ([], ["--dry_run"]):
        assert main(["--config_file", str(config), *arguments]) == 2
        printed = capsys.readouterr().err
        assert printed.endswith("error: lr_scheduler = cosine_with_min_lr needs lr_scheduler_min_lr_ratio\n")
        assert "to encode" not in printed
    config = write_config(
        tmp_path / "c.toml", pictures, tmp_path / "out", lr_scheduler="cosine", lr_warmup_steps=500
    )
    assert main(["--config_file", str(config), "--dry_run"]) == 0
    assert (
        "lr_warmup_steps (500) and lr_decay_steps (0) are more than the 12 steps" in capsys.readouterr().out
    )


def test_a_corrupt_picture_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = draw_pictures(tmp_path / "data" / "1_x", SIZES[:2])
    (folder / "broken.jpg").write_bytes(b"\xff\xd8\xff not a picture")
    config = write_config(tmp_path / "c.toml", tmp_path / "data", tmp_path / "out")
    assert main(["--config_file", str(config)]) == 2
    assert "broken.jpg" in capsys.readouterr().err


def test_a_folder_without_captions_or_token_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    draw_pictures(tmp_path / "data" / "1", SIZES[:2], captions=False)
    config = write_config(tmp_path / "c.toml", tmp_path / "data", tmp_path / "out")
    assert main(["--config_file", str(config)]) == 2
    assert "no .txt captions and no class tokens" in capsys.readouterr().err
    config = write_config(tmp_path / "d.toml", tmp_path / "data", tmp_path / "out", caption_dropout_rate=1.0)
    assert main(["--config_file", str(config), "--dry_run"]) == 0


def test_dry_run_counts_what_a_run_trains(tmp_path: Path, pictures: Path):
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", network_dim=8)
    printed = run(config, "--dry_run").stdout
    rows = dict(re.findall(r"^  (\w[\w ]+?)  +(.+)$", printed, flags=re.M))
    assert rows["images"] == "6 used, 12 an epoch with repeats"
    assert rows["epochs"] == "2"
    assert int(rows["total steps"]) == 2 * int(rows["steps per epoch"])
    run(config)
    tensors = load_file(tmp_path / "out" / "out.safetensors")
    trained = sum(tensor.numel() for key, tensor in tensors.items() if not key.endswith("alpha"))
    assert rows["parameters"].startswith(f"{trained:,} trained")


def test_help_answers_at_once():
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, str(ROOT / "flux_train_network.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert time.perf_counter() - start < 1.5
    assert "--network_module" in done.stdout


@pytest.mark.parametrize(
    "changes",
    [
        {"cache_latents": False, "flip_aug": True, "random_crop": True, "color_aug": True},
        {"cache_text_encoder_outputs": False, "shuffle_caption": True, "caption_dropout_rate": 0.3},
        {
            "network_train_unet_only": None, "text_encoder_lr": [1e-3], "caption_dropout_rate": 0.5,
            "shuffle_caption": True,
        },
        {
            "network_train_unet_only": None, "cache_text_encoder_outputs": False, "apply_t5_attn_mask": True,
            "network_args": ["train_t5xxl=True"], "gradient_checkpointing": True,
        },
        {"mixed_precision": "bf16", "fp8_base": True, "gradient_checkpointing": True, "full_bf16": True},
        {
            "mixed_precision": "bf16", "fp8_base": True, "cpu_offload_checkpointing": True, "blocks_to_swap": 1,
            "gradient_accumulation_steps": 2, "sample_at_first": True, "validation_split": 0.2,
            "sample_prompts": "w --w 64 --h 64",
        },
        {"torch_compile": True, "dynamo_backend": "aot_eager", "gradient_checkpointing": True},
        {
            "mixed_precision": "bf16", "base_compute": "fp8", "join_adapter": "on", "apply_t5_attn_mask": True,
            "optimizer_args": ["fused=True"], "gradient_accumulation_steps": 2, "sample_at_first": True,
            "sample_prompts": "w --w 64 --h 64", "validation_split": 0.2,
        },
        {"mixed_precision": "bf16", "base_compute": "int8", "blocks_to_swap": 1, "join_adapter": "on"},
        {"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "factor=4"]},
        {"optimizer_type": "AdamWScheduleFree", "sample_at_first": True, "sample_prompts": "w --w 64 --h 64"},
        {"optimizer_type": "Prodigy", "learning_rate": 1.0, "gradient_accumulation_steps": 3},
        {"optimizer_type": "AdamW8bit", "scale_weight_norms": 1.0, "timestep_sampling": "flux_shift"},
        {
            "optimizer_type": "Adafactor", "optimizer_args": ["relative_step=False", "scale_parameter=False"],
            "loss_type": "huber", "huber_schedule": "exponential", "timestep_sampling": "sigma",
            "weighting_scheme": "logit_normal", "model_prediction_type": "sigma_scaled",
        },
    ],
    ids=lambda changes: "+".join(changes)[:60],
)  # fmt: skip
def test_options_train(tmp_path: Path, pictures: Path, changes: dict[str, object]):
    """Each way of training ends with a file whose network does something."""
    handlers = {
        number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    }
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", max_train_epochs=1, **changes)
    assert main(["--config_file", str(config)]) == 0
    for number, handler in handlers.items():
        signal.signal(number, handler)
    tensors = load_file(tmp_path / "out" / "out.safetensors")
    changed = [k for k, v in tensors.items() if re.search("lora_up|lokr_w2", k) and v.abs().max() > 0]
    assert changed
    trains_text = changes.get("network_train_unet_only", True) is None
    assert any(key.startswith("lora_te1_text_model_encoder_layers_0") for key in tensors) == trains_text
    assert any("lora_te3_encoder_block_0" in key for key in tensors) == ("train_t5xxl=True" in str(changes))


def test_full_fp16_trains_fp16_weights(tmp_path: Path):
    folder = draw_pictures(tmp_path / "data" / "1_x", [(32, 32)] * 2)
    config = write_config(
        tmp_path / "c.toml", folder.parent, tmp_path / "out", mixed_precision="fp16", full_fp16=True,
        optimizer_type="Lion", no_half_vae=True, resolution="32,32", max_train_epochs=1,
    )  # fmt: skip
    assert main(["--config_file", str(config)]) == 0
    tensors = load_file(tmp_path / "out" / "out.safetensors")
    ups = [tensor for key, tensor in tensors.items() if "lora_up" in key]
    assert {tensor.dtype for tensor in ups} == {torch.float16}
    assert any(tensor.abs().max() > 0 for tensor in ups)
