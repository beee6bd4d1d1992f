"""Rules over several options: what is refused, what is remarked on, what is advised."""

from pathlib import Path

import pytest

from library.config.advice import MEANINGS, advice_markdown
from library.config.effects import PHRASES
from library.config.load import load_config
from library.config.notices import code_of
from library.config.show import resolved_table
from library.config.train_config import OPTIONS
from library.errors import ConfigError

COMPLETE = {
    "pretrained_model_name_or_path": "polyrank/tiny-flux",
    "network_module": "networks.lora_flux",
    "output_dir": "out",
    "train_data_dir": "data",
    "guidance_scale": "1.0",
    "timestep_sampling": "shift",
    "discrete_flow_shift": "3.1582",
    "model_prediction_type": "raw",
    "network_train_unet_only": "",
    "learning_rate": "1e-4",
}


def words(**changes):
    """The command line of a complete config with some options changed; None leaves one out, "" is a flag."""
    options = {**COMPLETE, **changes}
    line = []
    for name, value in options.items():
        if value is not None:
            line += [f"--{name}", *([] if value == "" else value.split(" "))]
    return line


def test_a_complete_config_has_nothing_to_say():
    assert load_config(words()).notices == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"network_module": None}, "network_module is missing: give networks.lora_flux"),
        (
            {"network_module": "networks.lora"},
            "is the module for Stable Diffusion; FLUX's is networks.lora_flux",
        ),
        ({"pretrained_model_name_or_path": None}, "pretrained_model_name_or_path is missing"),
        (
            {"pretrained_model_name_or_path": "flux1-dev.safetensors", "ae": "ae.sft"},
            "clip_l and t5xxl missing: the file flux1-dev.safetensors holds the transformer only",
        ),
        ({"output_dir": None}, "output_dir is missing"),
        (
            {"output_dir": f"{__file__}/out"},
            "test_config_rules.py is a file, not a folder; name another folder",
        ),
        (
            {"log_with": "tensorboard", "logging_dir": __file__},
            "test_config_rules.py is a file, not a folder; name another folder",
        ),
        ({"log_with": "tensorboard"}, "needs logging_dir"),
        ({"log_with": "all"}, "needs logging_dir"),
        ({"log_with": "wandb", "log_tracker_config": "none.toml"}, "none.toml does not exist"),
        ({"resume_from_huggingface": ""}, "needs resume: name the uploaded state, user/repository/folder"),
        ({"resume_from_huggingface": "", "resume": "auto"}, "needs resume"),
        ({"huggingface_repo_visibility": "open"}, "is not one of public, private"),
        ({"huggingface_repo_type": "film"}, "is not one of model, dataset, space"),
        ({"train_data_dir": None}, "no data: give train_data_dir"),
        ({"dataset_config": "none.toml"}, "dataset_config (command line): none.toml does not exist"),
        ({"resume": "no/state"}, "resume (command line): no/state does not exist"),
        ({"network_weights": "no.safetensors"}, "no.safetensors does not exist"),
        ({"lr_warmup_steps": "10%"}, "use constant_with_warmup, or remove the warm-up"),
        ({"lr_scheduler": "cosin"}, "is not a known schedule; did you mean 'cosine'?"),
        (
            {"min_timestep": "900", "max_timestep": "100"},
            "--min_timestep 900 (command line) is above --max_timestep 100",
        ),
        ({"torch_compile": "", "dynamo_backend": "fx2trt"}, "is no longer part of torch: use inductor"),
        ({"loss_type": "huber"}, "set huber_schedule to exponential or constant"),
        ({"full_bf16": ""}, "needs mixed_precision bf16, not no"),
        ({"full_fp16": "", "mixed_precision": "bf16"}, "needs mixed_precision fp16, not bf16"),
        ({"full_fp16": "", "mixed_precision": "fp16"}, "use AdamW8bit, Adafactor or Lion"),
        (
            {"fp8_base": ""},
            "--fp8_base (command line) needs mixed_precision bf16 or fp16: set mixed_precision to",
        ),
        ({"base_compute": "fp8"}, "--base_compute 'fp8' (command line) needs mixed_precision bf16 or fp16"),
        (
            {"base_compute": "int8", "mixed_precision": "bf16", "network_args": "ggpo_sigma=0.1"},
            "ggpo_sigma and ggpo_beta cannot be used with",
        ),
        ({"initial_step": "1600"}, "is not below max_train_steps = 1600"),
        ({"global_batch_size": "8", "gradient_accumulation_steps": "2"}, "which decides the accumulation"),
        ({"network_train_text_encoder_only": ""}, "leave nothing to train"),
        ({"dim_from_weights": ""}, "needs network_weights"),
        ({"base_weights_multiplier": "1.0"}, "more values than base_weights has files (0)"),
        (
            {
                "network_train_unet_only": None,
                "network_args": "train_t5xxl=True",
                "cache_text_encoder_outputs": "",
            },
            "T5's outputs change while it is trained",
        ),
        ({"text_encoder_lr": "1 2 3"}, "give one value, or two for CLIP-L and T5"),
        ({"sample_every_n_steps": "5"}, "needs sample_prompts"),
        ({"sample_every_n_steps": "5", "sample_prompts": "none.txt"}, "there is no such file"),
    ],
)
def test_broken_rules_are_refused_in_one_sentence(changes, message):
    with pytest.raises(ConfigError) as caught:
        load_config(words(**changes))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"lr_warmup_steps": "10", "lr_scheduler": "constant_with_warmup"},
        {"lr_warmup_steps": "10", "optimizer_type": "AdamWScheduleFree"},
        {"loss_type": "huber", "huber_schedule": "constant"},
        {"fp8_base": "", "mixed_precision": "bf16"},
        {"sample_every_n_steps": "5", "sample_prompts": "a"},
        {"resume": "auto"},
        {"initial_step": "1599"},
        {"resume": "me/lora/out-state:main", "resume_from_huggingface": ""},
        {"log_with": "wandb", "wandb_run_name": "one"},
        {"huggingface_repo_id": "me/lora", "huggingface_repo_visibility": "public", "async_upload": ""},
        {"conditioning_data_dir": "masks", "masked_loss": ""},
    ],
)
def test_the_allowed_neighbours_of_refused_configs(changes):
    assert load_config(words(**changes)).notices == ()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"max_train_epochs": "2", "max_train_steps": "9"},
            "decides the length, so ignored: --max_train_steps 9",
        ),
        (
            {"resume": "auto", "initial_epoch": "3"},
            "--resume auto (command line) finds decides the start, so ignored: --initial_epoch 3",
        ),
        (
            {"in_json": "meta.json", "reg_data_dir": "reg"},
            "in_json names the data, so ignored: --reg_data_dir reg",
        ),
        ({"wandb_run_name": "one"}, 'without log_with = "wandb" no effect: wandb_run_name'),
        ({"log_prefix": "a"}, "without log_with or logging_dir no effect: log_prefix"),
        ({"async_upload": ""}, "without huggingface_repo_id nothing is uploaded, so ignored: async_upload"),
        ({"conditioning_data_dir": "masks"}, "without masked_loss no effect: --conditioning_data_dir masks"),
        (
            {"huggingface_repo_id": "me/x", "huggingface_token": "hf_x"},
            "the environment variable HF_TOKEN cannot",
        ),
        (
            {"recompute": "cheap", "compile_blocks": "on"},
            "no effect: it needs gradient_checkpointing and compile",
        ),
        (
            {"recompute_blocks": "8"},
            "--recompute_blocks 8 (command line) has no effect: it needs gradient_checkp",
        ),
        (
            {"recompute_blocks": "auto", "gradient_checkpointing": "", "deepspeed": "", "zero_stage": "3"},
            "recomputes all blocks with zero_stage 3, where no GPU holds the model: give a number",
        ),
        (
            {"recompute_blocks": "0", "cpu_offload_checkpointing": ""},
            "cpu_offload_checkpointing has no effect: --recompute_blocks 0 (command line) keeps all",
        ),
        ({"clip_skip": "2"}, "No effect: clip_skip"),
    ],
)
def test_what_is_worth_saying_is_said_once(changes, message):
    notices = load_config(words(**changes)).notices
    assert len(notices) == 1
    assert message in notices[0]


@pytest.mark.parametrize(
    ("changes", "code", "message"),
    [
        ({"mixed_precision": "fp16"}, "flux-fp16", "recommended: bf16"),
        ({"sample_prompts": "a"}, "samples-never", "no sample is drawn"),
        ({"guidance_scale": None}, "flux-guidance", "guidance_scale is not given and stays at 3.5"),
        ({"timestep_sampling": None}, "flux-timesteps", "recommended: shift or flux_shift"),
        ({"model_prediction_type": None}, "flux-prediction", "stays at sigma_scaled"),
        ({"discrete_flow_shift": None}, "flux-shift", "recommended: 3.1582"),
        ({"learning_rate": None}, "learning-rate-default", "recommended: 1e-4 for a LoRA"),
        (
            {"learning_rate": None, "optimizer_type": "Prodigy"},
            "learning-rate-default",
            "recommended: 1.0 with Prodigy",
        ),
        ({"optimizer_type": "Prodigy"}, "learning-rate-adaptive", "--learning_rate 0.0001 (command line)"),
        (
            {"pretrained_model_name_or_path": "folder", "learning_rate": "0.01"},
            "learning-rate-high",
            "likely to diverge",
        ),
        (
            {"pretrained_model_name_or_path": "folder", "unet_lr": "1e-7"},
            "learning-rate-low",
            "--unet_lr 1e-07 (command line)",
        ),
        ({"network_train_unet_only": None}, "clip-l-trained", "CLIP-L is trained as well"),
        ({"text_encoder_lr": "1e-5"}, "text-encoder-lr-unused", "remove one of them"),
    ],
)
def test_advice_has_a_code_by_which_it_is_silenced(changes, code, message):
    (notice,) = load_config(words(**changes)).notices
    assert code_of(notice) == code
    assert message in notice
    assert load_config(words(**changes, ignore_advice=f"{code} flux-fp16")).notices == ()


def test_an_adaptive_optimizer_at_one_is_fine():
    assert load_config(words(optimizer_type="Prodigy", learning_rate="1.0")).notices == ()


def test_a_code_that_is_none_is_refused():
    with pytest.raises(
        ConfigError, match="'flux-guidence' is not a code of advice; did you mean 'flux-guidance'"
    ):
        load_config(words(ignore_advice="flux-guidence"))


def test_every_code_is_explained_and_used(repository):
    code = "\n".join(
        path.read_text(encoding="utf-8")
        for path in (repository / "library").rglob("*.py")
        if path.name != "advice.py"
    )
    assert [name for name in MEANINGS if f'"{name}"' not in code] == []
    assert (repository / "docs/advice.md").read_text(encoding="utf-8") == advice_markdown(), (
        "run python -m tools.write_options"
    )


def test_phrases_are_of_options_that_do_something():
    assert {name for name in PHRASES if OPTIONS[name].row.effect.state != "used"} == set()
    options = {"network_dim": "16", "network_alpha": "16", "lr_warmup_steps": "10%", "lr_scheduler": "cosine"}
    options |= {"gradient_checkpointing": "", "recompute_blocks": "8"}
    loaded = load_config(words(**options, max_train_epochs="1"))
    said = {row.name: row.effect for row in resolved_table(loaded)}
    assert said["recompute_blocks"] == "the first 8 blocks are recomputed"
    assert said["network_alpha"] == "what the network adds is scaled by alpha / dim = 1"
    assert said["lr_warmup_steps"] == "the rate rises over 10% of the run"
    assert said["max_train_epochs"] == "stops after 1 epoch"
    assert said["max_train_steps"] == "not used: max_train_epochs decides"
    assert said["huber_c"] == "not used by this loss_type"
    assert said["enable_bucket"] == "off"


def test_a_dataset_file_wins_over_folders(tmp_path):
    path = tmp_path / "data.toml"
    path.touch()
    loaded = load_config(words(dataset_config=str(path)))
    assert loaded.notices == (
        "dataset_config names the data, so ignored: --train_data_dir data (command line)",
    )
    assert loaded.config.dataset.dataset_config == Path(path)


def test_secrets_are_never_shown(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(
        "[a]\nhuggingface_token = 'hf_FIRST'\n[b]\nhuggingface_token = 'hf_SECOND'\n", encoding="utf-8"
    )
    keys = ["--wandb_api_key", "KEY_ONE", "--wandb_api_key", "KEY_TWO", "--config_file", str(path)]
    loaded = load_config([*words(), *keys])
    said = " ".join([*loaded.notices, *(row.value for row in resolved_table(loaded))])
    assert "huggingface_token is given twice" in said
    assert "--wandb_api_key is given several times" in said
    with pytest.raises(ConfigError) as caught:
        OPTIONS["huggingface_token"].read(["hf_FIRST"], "c.toml line 2")
    said += str(caught.value)
    assert not [secret for secret in ("hf_FIRST", "hf_SECOND", "KEY_ONE", "KEY_TWO") if secret in said]


def test_a_folder_that_cannot_be_written_is_refused_before_hours_of_training(tmp_path, monkeypatch):
    # A test may run as root, whom nothing is refused.
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(ConfigError, match=f"nothing can be written into {tmp_path}; name another folder"):
        load_config(words(output_dir=f"{tmp_path}/new/out"))
