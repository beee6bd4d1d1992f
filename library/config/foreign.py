"""Keys that config files carry although they are no options: names of GUIs, of wrappers and of other trainers.

Each is another name of an option, an argument of the network, or without effect for a stated reason. A key
that is neither an option nor here is a misspelling where an option is near, and else listed as ignored.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of `option`. It counts only when neither that option nor any of `unless` is given.

    It also needs one of `needs`, if there are any; `otherwise` says why.
    """

    option: str
    unless: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    otherwise: str = ""
    unit: str = ""  # what is written after the value


@dataclass(frozen=True, slots=True)
class NetworkArgument:
    """A key that belongs into network_args, as `name`=value, for the network modules that know it."""

    name: str
    modules: tuple[str, ...]  # beginnings of network_module
    unset: tuple[object, ...] = ()  # values that stand for "not given"
    switch: str = ""  # another key; false there means "not given" here


_EPOCHS = Alias("max_train_epochs", unless=("max_train_steps",))

ALIASES = {
    "batch_size": Alias("train_batch_size"),
    # GUIs write `epoch` for themselves beside the number of steps that they computed from it.
    "epoch": _EPOCHS,
    "epochs": _EPOCHS,
    "num_repeats": Alias(
        "dataset_repeats",
        needs=("dataset_config", "in_json"),
        otherwise="the names of the folders, N_name, say it",
    ),
    "optimizer": Alias("optimizer_type"),
    "max_resolution": Alias("resolution"),
    "lr_warmup": Alias("lr_warmup_steps", unit="%"),
    "flux1_clip_l": Alias("clip_l"),
    "flux1_t5xxl": Alias("t5xxl"),
    "flux1_cache_text_encoder_outputs": Alias("cache_text_encoder_outputs"),
    "flux1_cache_text_encoder_outputs_to_disk": Alias("cache_text_encoder_outputs_to_disk"),
    "dataloader_num_workers": Alias("max_data_loader_n_workers"),
    "torch_compile_backend": Alias("dynamo_backend"),
}

# Keys from before blocks_to_swap, and how much of a step of that one block of theirs is: a step takes about a
# double block's weights off the GPU.
OLD_SWAP_KEYS = {"double_blocks_to_swap": 1.0, "single_blocks_to_swap": 0.5}

FLUX, OFT, LYCORIS = "networks.lora_flux", "networks.oft_flux", "lycoris."
_OF_FLUX = (
    "train_blocks train_double_block_indices train_single_block_indices split_qkv in_dims img_attn_dim "
    "txt_attn_dim img_mlp_dim txt_mlp_dim img_mod_dim txt_mod_dim single_dim single_mod_dim"
)
_OF_BOTH = "train_t5xxl rank_dropout module_dropout"
_PLUS = "loraplus_lr_ratio loraplus_unet_lr_ratio loraplus_text_encoder_lr_ratio"
_OF_LYCORIS = (
    "algo preset conv_dim conv_alpha factor use_tucker use_cp use_scalar dora_wd train_norm decompose_both "
    "bypass_mode rescaled train_on_input"
)

NETWORK_ARGUMENTS = {
    **{name: NetworkArgument(name, (FLUX,)) for name in _OF_FLUX.split()},
    **{name: NetworkArgument(name, (FLUX, LYCORIS)) for name in _OF_BOTH.split()},
    **{name: NetworkArgument(name, (FLUX, LYCORIS), unset=(0,)) for name in _PLUS.split()},
    **{name: NetworkArgument(name, (LYCORIS,)) for name in _OF_LYCORIS.split()},
    "ggpo_sigma": NetworkArgument("ggpo_sigma", (FLUX,), switch="train_lora_ggpo"),
    "ggpo_beta": NetworkArgument("ggpo_beta", (FLUX,), switch="train_lora_ggpo"),
    "enable_all_linear": NetworkArgument("enable_all_linear", (OFT,)),
    "LyCORIS_preset": NetworkArgument("preset", (LYCORIS,)),
    "constrain": NetworkArgument("constraint", (LYCORIS,)),
    "unit": NetworkArgument("block_size", (LYCORIS,)),
}

_REASONS = {
    "FLUX is trained with plain Gaussian noise": "noise_offset_type",
    "only adapters are saved": "mem_eff_save save_clip save_t5xxl",
    "it was removed from Kohya's trainer; lowram is another option": "lowvram",
    "GGPO is on when ggpo_sigma and ggpo_beta are given": "train_lora_ggpo",
    "no network here reads it": "rank_dropout_scale",
    "write two values into text_encoder_lr, for CLIP-L and T5": "t5xxl_lr",
    "network_module and its network_args decide": "LoRA_type",
    "write these as options of their own": "additional_parameters",
    "text encoders are trained to the end or not at all": "stop_text_encoder_training",
    "it is a state of the GUI": "model_list save_as_bool flux1_checkbox sdxl sd3_checkbox",
    "num_gpus says it, or accelerate launch": "num_processes multi_gpu",
    "give it to accelerate launch": (
        "num_machines num_cpu_threads_per_process gpu_ids main_process_port main_process_ip "
        "dynamo_mode dynamo_use_dynamic dynamo_use_fullgraph extra_accelerate_launch_args"
    ),
    "it belongs to full fine-tuning": (
        "blockwise_fused_optimizers flux_fused_backward_pass fused_optimizer_groups "
        "learning_rate_te learning_rate_te1 learning_rate_te2"
    ),
    "it belongs to another model family": (
        "clip_g gemma2 clip_g_dropout_rate t5xxl_device t5xxl_dtype pos_emb_random_crop_rate "
        "no_token_padding sdxl_cache_text_encoder_outputs sdxl_no_half_vae v_pred "
        "sd3_cache_text_encoder_outputs sd3_cache_text_encoder_outputs_to_disk sd3_clip_l "
        "sd3_fused_backward_pass sd3_text_encoder_batch_size sd3_clip_l_dropout_rate sd3_t5xxl "
        "sd3_disable_mmap_load_safetensors sd3_enable_scaled_pos_embed sd3_t5_dropout_rate"
    ),
    "only networks of Stable Diffusion have block weights": (
        "block_alphas block_dims block_lr_zero_threshold conv_block_alphas conv_block_dims "
        "down_lr_weight mid_lr_weight up_lr_weight"
    ),
    "timestep_sampling flux_shift shifts between 0.5 and 1.15": "base_shift max_shift",
    "sample_prompts say it for each picture": "steps denoise num_prompts",
    "every step is logged": "log_every_n_steps",
    "the option is attention, which by itself takes the fastest kernel that is right": "flash_attn",
    "torch's default mode is used": "torch_compile_mode",
    "it is no option, the trainer chooses": (
        "enable_cudnn_benchmark cudnn_deterministic tf32_mode use_tensorcore"
    ),
    "it is no option; cache_info may be meant": "cache_info_to_disk",
    "it is no option; apply_t5_attn_mask may be meant": "apt",
    "it is an option of a fork of Kohya's trainer": "fourier_config fourier_mode fourier_weight",
    "the option is ae": "AE_PATH",
    "the option is clip_l": "CLIP_L_PATH",
    "the option is t5xxl": "T5XXL_PATH",
    "the option is pretrained_model_name_or_path": "MODEL_PATH",
    "the option is train_data_dir": "dataset_path",
    "the option is dataset_config": "dataset_toml",
    "the option is network_dim": "lora_rank",
    "the option is sample_prompts": "eval_prompts",
    "it is the note of another program": (
        "author description name version train_type model_train_type train_mode mode caption_mode "
        "prep_dataset _description _base _branch_id _build_id _script _model_type"
    ),
}
WITHOUT_EFFECT = {key: reason for reason, keys in _REASONS.items() for key in keys.split()}

# Tables of a dataset file; in a train file they would be taken for options.
DATASET_TABLES = frozenset({"datasets", "subsets"})


def what_instead(key: str) -> str:
    """What to do with a foreign `key` on the command line, where no option of that name can be given; or ""."""
    if key in ALIASES:
        return f"; here it is --{ALIASES[key].option}"
    if key in OLD_SWAP_KEYS:
        return "; here it is --blocks_to_swap"
    if key in NETWORK_ARGUMENTS:
        return f"; give it as --network_args {NETWORK_ARGUMENTS[key].name}=..."
    return f"; leave it out: {WITHOUT_EFFECT[key]}" if key in WITHOUT_EFFECT else ""
