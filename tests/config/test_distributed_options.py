"""DeepSpeed's options: sources and their order, what is refused, the configs and docs that go with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_deepspeed_cmd_env

from library.config.launcher import engine_settings
from library.config.load import load_config
from library.config.loaded import LoadedConfig
from library.config.zero_limits import LIMITS, with_limits
from library.errors import ConfigError

ROOT = Path(__file__).resolve().parent.parent.parent
NEEDED = (
    "--pretrained_model_name_or_path", "polyrank/tiny-flux", "--network_module", "networks.lora_flux",
    "--train_data_dir", "data", "--output_dir", "out", "--network_train_unet_only",
)  # fmt: skip


def load(*arguments: str) -> LoadedConfig:
    return load_config([*NEEDED, *arguments])


def launched(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    """Set the variables that `accelerate launch` with `arguments` sets."""
    parsed = launch_command_parser().parse_args([*arguments, "flux_train_network.py"])
    parsed.num_processes = 2
    parsed.mixed_precision, parsed.gpu_ids = parsed.mixed_precision or "no", None
    parsed.num_machines, parsed.main_process_port = 1, 0
    parsed.deepspeed_fields_from_accelerate_config = ""
    _, environment = prepare_deepspeed_cmd_env(parsed)
    for name, value in environment.items():
        if name.startswith("ACCELERATE_"):
            monkeypatch.setenv(name, value)


def test_accelerate_launch_chooses_deepspeed(monkeypatch: pytest.MonkeyPatch):
    assert not load().config.distributed.uses_deepspeed
    launched(
        monkeypatch,
        "--use_deepspeed",
        "--zero_stage",
        "3",
        "--offload_param_device",
        "cpu",
        "--num_processes",
        "2",
    )
    chosen = load().config.distributed
    assert chosen.uses_deepspeed
    assert (chosen.zero_stage, chosen.offload_param_device, chosen.offload_optimizer_device) == (
        3,
        "cpu",
        None,
    )


def test_the_nearer_source_wins(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    file = tmp_path / "zero.json"
    file.write_text(json.dumps({"zero_optimization": {"stage": 1, "offload_optimizer": {"device": "cpu"}}}))
    launched(monkeypatch, "--use_deepspeed", "--zero_stage", "3")
    assert load().config.distributed.zero_stage == 3
    assert load("--ds_config", str(file)).config.distributed.zero_stage == 1
    both = load("--ds_config", str(file), "--zero_stage", "2")
    assert both.config.distributed.zero_stage == 2
    assert both.config.distributed.offload_optimizer_device == "cpu"
    ddp = load("--distributed", "ddp")
    assert not ddp.config.distributed.uses_deepspeed
    assert any("accelerate's DeepSpeed is not used" in notice for notice in ddp.notices)


def test_backends_that_contradict_each_other():
    with pytest.raises(ConfigError, match=r"--distributed 'ddp' .* contradicts --deepspeed"):
        load("--deepspeed", "--distributed", "ddp")
    idle = load("--zero_stage", "3")
    assert any("no effect without deepspeed: --zero_stage 3" in notice for notice in idle.notices)


def test_a_deepspeed_file_implies_deepspeed_and_what_options_decide_is_named(tmp_path: Path):
    file = tmp_path / "zero.json"
    content = {
        "train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 4, "fp16": {"enabled": "auto"},
        "bf16": {"enabled": True}, "wall_clock_breakdown": True,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "allgather_bucket_size": 1000},
    }  # fmt: skip
    file.write_text(json.dumps(content))
    loaded = load("--ds_config", str(file))
    assert loaded.config.distributed.uses_deepspeed
    (said,) = [notice for notice in loaded.notices if "decided by the options" in notice]
    assert "gradient_accumulation_steps (give gradient_accumulation_steps)" in said
    assert "bf16 (give mixed_precision)" in said
    assert "fp16" not in said
    assert "train_micro_batch" not in said
    assert engine_settings(file) == {
        "wall_clock_breakdown": True,
        "zero_optimization": {"stage": 2, "allgather_bucket_size": 1000},
    }


@pytest.mark.parametrize(
    ("text", "sentence"), [(None, "does not exist"), ("{", "is no JSON file"), ("[]", "must hold an object")]
)
def test_a_deepspeed_file_that_cannot_be_used(tmp_path: Path, text: str | None, sentence: str):
    file = tmp_path / "zero.json"
    if text is not None:
        file.write_text(text)
    with pytest.raises(ConfigError, match=sentence):
        load("--ds_config", str(file))


# Options that run into each row of the table, beside --deepspeed; in the order of the table.
BROKEN = (
    ("--optimizer_type", "AdamW8bit"),
    ("--optimizer_type", "AdamWScheduleFree"),
    ("--optimizer_type", "DAdaptAdam"),
    ("--optimizer_type", "Adafactor"),
    ("--optimizer_type", "CAME"),
    ("--optimizer_type", "Adagrad"),
    ("--optimizer_type", "some.module.Optimizer"),
    ("--optimizer_type", "Prodigy", "--text_encoder_lr", "1.0"),
    ("--optimizer_type", "Prodigy", "--optimizer_args", "slice_p=11"),
    ("--network_args", "module_dropout=0.1"),
    ("--network_args", "ggpo_sigma=0.03", "ggpo_beta=0.01"),
    ("--full_bf16", "--mixed_precision", "bf16"),
    ("--fp8_base", "--mixed_precision", "bf16"),
    ("--base_compute", "fp8", "--mixed_precision", "bf16"),
    ("--join_adapter", "on"),
    ("--torch_compile",),
    ("--blocks_to_swap", "8"),
    ("--offload_param_device", "cpu"),
    ("--offload_param_device", "nvme"),
    ("--offload_optimizer_device", "cpu"),
)


@pytest.mark.parametrize(
    ("limit", "options"), zip(LIMITS, BROKEN, strict=True), ids=lambda value: str(value)[:40]
)
def test_every_row_of_the_table_is_refused_in_one_sentence(limit, options: tuple[str, ...]):
    needed = [
        word for word in NEEDED if word != "--network_train_unet_only" or "--text_encoder_lr" not in options
    ]
    for stage in range(4):
        arguments = [*needed, "--deepspeed", "--zero_stage", str(stage), *options]
        if stage in limit.stages:
            with pytest.raises(ConfigError, match=f"ZeRO stage {stage} cannot be used with") as caught:
                load_config(arguments)
            assert limit.why in str(caught.value)
            assert limit.instead in str(caught.value)
        elif limit.what not in ("offload_param_device nvme without offload_param_nvme_path",):
            load_config(arguments)


@pytest.mark.parametrize(
    "optimizer", ["AdamW", "Prodigy", "Lion", "SGDNesterov", "torch.optim.RAdam", "adamw_torch"]
)
def test_optimizers_that_zero_takes(optimizer: str):
    assert load("--deepspeed", "--optimizer_type", optimizer).config.distributed.zero_stage == 2


def test_the_docs_have_the_table_of_limits():
    page = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    assert with_limits(page) == page, "run python -m tools.write_options"


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_loads_our_configs(path: Path):
    config = load_config_from_file(str(path))  # refuses keys it does not know
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    machines = 2 if "2nodes" in path.stem else 1
    gpus = 8 if machines == 2 else int(path.stem.split("_")[1].removesuffix("gpu"))
    assert (config.num_processes, config.num_machines) == (gpus * machines, machines)
    stage = content.get("deepspeed_config", {}).get("zero_stage")
    assert path.stem.startswith("ddp" if stage is None else f"zero{stage}_")
    assert path.name in path.read_text(encoding="utf-8").splitlines()[1]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "configs" / "deepspeed").glob("*.json")), ids=lambda path: path.stem
)
def test_our_deepspeed_files_load(path: Path):
    loaded = load("--ds_config", str(path))
    assert loaded.config.distributed.zero_stage == int(path.stem[4])
    assert (loaded.config.distributed.offload_param_device == "cpu") == path.stem.endswith("offload")
    assert not [notice for notice in loaded.notices if "decided by" in notice]


def test_num_gpus_is_a_number_or_all():
    assert load().config.distributed.num_gpus is None
    assert load("--num_gpus", "4").config.distributed.num_gpus == 4
    assert load("--num_gpus", "all").config.distributed.num_gpus == 0
    for wrong in ("-1", "two"):
        with pytest.raises(ConfigError, match=f"--num_gpus {wrong}"):
            load("--num_gpus", wrong)
    with pytest.raises(ConfigError, match=r"--distributed 'single' .* contradicts --num_gpus 2"):
        load("--distributed", "single", "--num_gpus", "2")


def test_num_gpus_under_a_launcher(monkeypatch: pytest.MonkeyPatch):
    for name, value in {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4"}.items():
        monkeypatch.setenv(name, value)
    for same in ("4", "all"):
        assert any(
            "is not needed: a launcher started" in notice for notice in load("--num_gpus", same).notices
        )
    with pytest.raises(
        ConfigError, match=r"--num_gpus 8 .* but a launcher started 4 processes on this machine"
    ):
        load("--num_gpus", "8")
    # A rank that --num_gpus itself started has nothing to say.
    monkeypatch.setenv("POLYRANK_STARTER", "1:/reports")
    assert not any("num_gpus" in notice for notice in load("--num_gpus", "8").notices)
