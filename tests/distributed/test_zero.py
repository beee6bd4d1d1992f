"""Two ranks under DDP and ZeRO 0 to 3 against one process: losses, files, states, resume on another backend.

A start of two ranks takes longer than the runs themselves, so one start does many runs (many_worker.py).
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from flux_train_network import main
from tests.e2e.running import ROOT, TINY, draw_pictures, write_config

WORKER = Path(__file__).parent / "many_worker.py"
ONE = "single"
BACKENDS: dict[str, dict[str, object]] = {
    "ddp": {}, **{f"zero{stage}": {"deepspeed": True, "zero_stage": stage} for stage in range(4)},
}  # fmt: skip
NETWORKS: dict[str, dict[str, object]] = {
    "lora": {},
    "loha": {"network_module": "lycoris.kohya", "network_args": ["algo=loha"]},
    "lokr": {"network_module": "lycoris.kohya", "network_args": ["algo=lokr", "factor=4"]},
}
OPTIMIZERS: dict[str, dict[str, object]] = {
    "adamw": {},
    # From 1e-6 five steps would move nothing that a tolerance of 1e-5 could see.
    "prodigy": {"optimizer_type": "Prodigy", "learning_rate": 1.0, "optimizer_args": ["d0=0.001"]},
}
STEPS: dict[str, object] = {
    "max_train_epochs": None, "max_train_steps": 5, "global_batch_size": 4, "save_state_on_train_end": True,
    "network_dim": 2, "t5xxl_max_token_length": 32, "ema_decay": 0.5,
    "cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "2_same", [(64, 64)] * 5)
    draw_pictures(folder / "1_wide", [(96, 64)] * 3)
    return folder


def on_two_ranks(configs: Sequence[Path]) -> None:
    """Do the runs of `configs`, in order, in one start of two ranks."""
    done = subprocess.run(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
            str(WORKER), *map(str, configs),
        ],
        capture_output=True, text=True, timeout=550, cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), os.environ.get("PYTHONPATH", "")))},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-16000:]


def losses(run: Path) -> list[float]:
    return json.loads((run / "out-state" / "train_state.json").read_text(encoding="utf-8"))["losses"]


def validation_losses(run: Path) -> list[tuple[int, float]]:
    state = json.loads((run / "out-state" / "train_state.json").read_text(encoding="utf-8"))
    return [(step, loss) for step, loss in state["validation_losses"]]


def furthest(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    assert first.keys() == second.keys()
    return max(float((first[key] - second[key].reshape_as(first[key])).abs().max()) for key in first)


def test_every_backend_takes_the_same_steps(tmp_path: Path, pictures: Path):
    kinds = [(network, optimizer) for network in NETWORKS for optimizer in OPTIMIZERS]
    # Stage 0 differs from DDP in who averages gradients alone: one network will do.
    runs = [(b, *kind) for b in (ONE, *BACKENDS) for kind in kinds if b != "zero0" or kind[0] == "lora"]
    configs = {
        (backend, network, optimizer): write_config(
            tmp_path / f"{backend}-{network}-{optimizer}.toml", pictures,
            tmp_path / f"{backend}-{network}-{optimizer}",
            **STEPS, **NETWORKS[network], **OPTIMIZERS[optimizer], **BACKENDS.get(backend, {}),
        )
        for backend, network, optimizer in runs
    }  # fmt: skip
    for run in runs:
        if run[0] == ONE:
            assert main(["--config_file", str(configs[run])]) == 0
    on_two_ranks([config for run, config in configs.items() if run[0] != ONE])

    for backend, *kind in runs:
        one, several = (tmp_path / "-".join((name, *kind)) for name in (ONE, backend))
        apart = max(abs(a - b) for a, b in zip(losses(one), losses(several), strict=True))
        assert apart < 1e-5, (backend, kind, apart)
        expected = load_file(one / "out.safetensors")
        assert furthest(expected, load_file(several / "out.safetensors")) < 1e-5, (backend, kind)
        averages = [load_file(run / "out-ema.safetensors") for run in (one, several)]
        assert furthest(*averages) < 1e-5, (backend, kind)
        assert furthest(expected, averages[0]) > 1e-5, "the average is another file"
        # The average again, and losses by picture, which ranks bring together: each picture was seen, by one of them.
        extras = [load_file(run / "out-state" / "extras.safetensors") for run in (one, several)]
        assert furthest(*extras) < 1e-4, (backend, kind)
        assert int(extras[1]["losses/visits"].sum()) == 13 + 4  # an epoch, and the first step of another
        ups = [key for key in expected if any(part in key for part in ("lora_up", "hada_w2_a", "lokr_w2_b"))]
        assert max(float(expected[key].abs().max()) for key in ups) > 1e-3, "nothing was trained"
    for optimizer_state in ("zero1", "zero2", "zero3"):
        saved = tmp_path / f"{optimizer_state}-lora-adamw" / "out-state" / "optimizer.safetensors"
        single = tmp_path / f"{ONE}-lora-adamw" / "out-state" / "optimizer.safetensors"
        assert furthest(load_file(single), load_file(saved)) < 1e-5, optimizer_state


def test_a_run_goes_on_under_other_backends(tmp_path: Path, pictures: Path):
    """ZeRO-2 on two ranks, then one process, then ZeRO-3, ZeRO-1 and DDP on two: as if it had never stopped."""
    stages = ({"deepspeed": True, "zero_stage": 2}, {}, *({**BACKENDS[b]} for b in ("zero3", "zero1", "ddp")))
    texts = {"network_train_unet_only": None, "cache_text_encoder_outputs": None}
    kinds: dict[str, dict[str, object]] = {
        # Two micro-steps a rank; two parameter groups, an encoder that runs in every step.
        "adamw": {"train_batch_size": 1, "text_encoder_lr": 1e-3, **texts},
        "prodigy": OPTIMIZERS["prodigy"],
    }

    def config(
        kind: str, name: str, steps: int, backend: dict[str, object], resume: Path | None = None
    ) -> Path:
        settings = {k: v for k, v in STEPS.items() if not (kind == "adamw" and "text_encoder" in k)}
        return write_config(
            tmp_path / f"{kind}-{name}.toml", pictures, tmp_path / f"{kind}-{name}",
            **{**settings, "max_train_steps": steps, **kinds[kind], **backend},
            resume=None if resume is None else str(resume / "out-state"),
        )  # fmt: skip

    on_two_ranks([config(kind, "first", 2, stages[0]) for kind in kinds])
    for kind in kinds:
        second = config(kind, "second", 4, stages[1], tmp_path / f"{kind}-first")
        assert main(["--config_file", str(second)]) == 0
        assert main(["--config_file", str(config(kind, "whole", 6, {}))]) == 0
    ends = ("zero3", "zero1", "ddp")
    on_two_ranks([
        config(kind, end, 6, BACKENDS[end], tmp_path / f"{kind}-second") for kind in kinds for end in ends
    ])  # fmt: skip
    for kind in kinds:
        expected = load_file(tmp_path / f"{kind}-whole" / "out.safetensors")
        for end in ends:
            got = load_file(tmp_path / f"{kind}-{end}" / "out.safetensors")
            assert furthest(expected, got) < 1e-5, (kind, end)
            averages = [
                load_file(tmp_path / f"{kind}-{run}" / "out-ema.safetensors") for run in ("whole", end)
            ]
            assert furthest(*averages) < 1e-5, (kind, end)


def test_stage_3_draws_validates_recomputes_and_limits_norms(tmp_path: Path, pictures: Path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        "a wave --w 32 --h 32 --s 2\nthree --w 32 --h 32 --s 1\nlast --w 32 --h 32 --s 1\n", "utf-8"
    )
    options = {
        "gradient_checkpointing": True, "validation_split": 0.2, "scale_weight_norms": 0.3, "sample_at_first": True,
        "sample_prompts": str(prompts), "sample_every_n_steps": 5, "learning_rate": 2e-2, "ema_for_samples": True,
        "keep_best": True, "validate_every_n_steps": 2,
    }  # fmt: skip
    plain = {**STEPS, **options}
    split = tmp_path / "split.json"
    split.write_text(json.dumps({"zero_optimization": {"stage3_param_persistence_threshold": 0}}), "utf-8")
    one = write_config(tmp_path / "one.toml", pictures, tmp_path / "one", **plain)
    both = {
        name: write_config(
            tmp_path / f"{name}.toml", pictures, tmp_path / name, **{**plain, **BACKENDS["zero3"], **more}
        )
        for name, more in {
            "zero3": {},
            "offloaded": {
                "offload_optimizer_device": "cpu",
                "offload_param_device": "cpu",
                "recompute_blocks": 1,
            },
            "bf16": {"mixed_precision": "bf16"},
            "early": {"early_stop_patience": 1, "early_stop_min_delta": 9.0},  # the first does count
            # Nothing that is trained stays whole: LyCORIS reads weights of modules that are never called.
            "split": {"ds_config": str(split), **NETWORKS["loha"], "scale_weight_norms": None},
        }.items()
    }
    halves = write_config(
        tmp_path / "fp8.toml", pictures, tmp_path / "fp8", **STEPS, **BACKENDS["zero2"], fp8_base=True,
        mixed_precision="bf16",
    )  # fmt: skip
    scaled = write_config(
        tmp_path / "fp16.toml",
        pictures,
        tmp_path / "fp16",
        **STEPS,
        **BACKENDS["zero2"],
        mixed_precision="fp16",
    )
    loha = write_config(
        tmp_path / "loha.toml", pictures, tmp_path / "loha",
        **{**plain, **NETWORKS["loha"], "scale_weight_norms": None},
    )  # fmt: skip
    for config in (one, loha):
        assert main(["--config_file", str(config)]) == 0
    on_two_ranks([*both.values(), halves, scaled])
    for name, reference in (("zero3", "one"), ("offloaded", "one"), ("split", "loha")):
        got, expected = (load_file(tmp_path / run / "out.safetensors") for run in (name, reference))
        assert furthest(expected, got) < 1e-4, name  # large steps, and norms cut back after each
        assert len(list((tmp_path / name / "sample").glob("*.png"))) == 6
        best, expected = (load_file(tmp_path / run / "out-best.safetensors") for run in (name, reference))
        assert furthest(expected, best) < 1e-4, name
        measured = [validation_losses(tmp_path / run) for run in (name, reference)]
        assert [step for step, _ in measured[0]] == [0, 2, 3, 4, 5]  # every two, and at the epochs' ends
        assert [loss for _, loss in measured[0]] == pytest.approx([loss for _, loss in measured[1]], rel=1e-3)
    assert [step for step, _ in validation_losses(tmp_path / "early")] == [0, 2, 3]
    for name in ("zero3", "bf16", "fp8", "fp16"):
        state = load_file(tmp_path / name / "out-state" / "model.safetensors")
        assert {tensor.dtype for tensor in state.values()} == {torch.float32}, name
        assert all(torch.isfinite(tensor).all() for tensor in state.values()), name
    scaler = json.loads((tmp_path / "fp16" / "out-state" / "train_state.json").read_text("utf-8"))["scaler"]
    assert dict(scaler)["scale"] >= 1024


def test_a_published_command_line_of_zero_2_with_prodigy(tmp_path: Path, pictures: Path):
    """As it stands in the file, but for the models, sizes that suit them, and its tracker, which needs an account."""
    file = ROOT / "tests/data/config/wild/cli/issue1475_two_gpus_deepspeed2_prodigy.txt"
    words = shlex.split(file.read_text("utf-8").replace("\\\n", " "))
    start = words.index("flux_train_network.py")
    assert words[:2] == ["accelerate", "launch"]
    changed = {
        **dict.fromkeys(("pretrained_model_name_or_path", "clip_l", "t5xxl", "ae"), TINY),
        "train_data_dir": str(pictures), "output_dir": str(tmp_path), "resolution": "64,64", "bucket_reso_steps": "16",
        "min_bucket_reso": "32", "max_bucket_reso": "96", "max_train_epochs": "1", "lr_warmup_steps": "1",
    }  # fmt: skip
    flat = [
        part
        for word in words[start + 1 :]
        for part in (word.split("=", 1) if word.startswith("--") else (word,))
    ]
    for option in ("log_with", "wandb_run_name", "wandb_api_key"):
        at = flat.index(f"--{option}")
        del flat[at : at + 2]
    for option, value in changed.items():
        flat[flat.index(f"--{option}") + 1] = value
    launch = [sys.executable, "-m", "accelerate.commands.launch", *words[2:start], "--num_processes", "1"]
    launch[launch.index("--main_process_port") + 1] = "0"
    done = subprocess.run(
        [*launch, "flux_train_network.py", *flat, "--tokenizer_cache_dir", TINY, "--t5xxl_max_token_length", "32"],
        capture_output=True, text=True, timeout=300, cwd=ROOT, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    saved = load_file(tmp_path / "flux_shot.safetensors")
    assert all(tensor.isfinite().all() for tensor in saved.values())
    assert "untested" not in done.stderr
