"""Keys that config files carry although they are no options: names of GUIs and of other trainers.

Listed are only those whose meaning is plain, and those that look like a misspelt option but are none.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Alias:
    """Another name of `option`. It counts only when neither that option nor any of `unless` is given."""

    option: str
    unless: tuple[str, ...] = ()


ALIASES = {
    "batch_size": Alias("train_batch_size"),
    # GUIs write `epoch` for themselves beside the number of steps that they computed from it.
    "epoch": Alias("max_train_epochs", unless=("max_train_steps",)),
    "epochs": Alias("max_train_epochs", unless=("max_train_steps",)),
    "optimizer": Alias("optimizer_type"),
    "max_resolution": Alias("resolution"),
    "flux1_clip_l": Alias("clip_l"),
    "flux1_t5xxl": Alias("t5xxl"),
    "flux1_cache_text_encoder_outputs": Alias("cache_text_encoder_outputs"),
    "flux1_cache_text_encoder_outputs_to_disk": Alias("cache_text_encoder_outputs_to_disk"),
    "dataloader_num_workers": Alias("max_data_loader_n_workers"),
}

# Keys from before blocks_to_swap, and how much of a step of that one block of theirs is: a step takes about a
# double block's weights off the GPU.
OLD_SWAP_KEYS = {"double_blocks_to_swap": 1.0, "single_blocks_to_swap": 0.5}

_OTHER_MODEL = "it belongs to another model family"
_LAUNCH = "give it to accelerate launch"
_ARGUMENT = 'write it into network_args, as "{key}=..."'

WITHOUT_EFFECT = {
    "noise_offset_type": "FLUX is trained with plain Gaussian noise",
    "mem_eff_save": "only adapters are saved",
    "lowvram": "it was removed from Kohya's trainer; lowram is another option",
    "num_repeats": "it belongs into a dataset_config file or into the folder name N_name",
    "clip_g": _OTHER_MODEL,
    "gemma2": _OTHER_MODEL,
    "sd3_clip_l": _OTHER_MODEL,
    "sd3_t5xxl": _OTHER_MODEL,
    **dict.fromkeys(
        ("num_processes", "num_machines", "num_cpu_threads_per_process", "multi_gpu", "gpu_ids"), _LAUNCH
    ),
    **dict.fromkeys(
        ("main_process_port", "dynamo_mode", "dynamo_use_dynamic", "dynamo_use_fullgraph"), _LAUNCH
    ),
    **{
        key: _ARGUMENT.format(key=key)
        for key in (
            *(
                "train_t5xxl",
                "split_qkv",
                "train_blocks",
                "train_double_block_indices",
                "train_single_block_indices",
            ),
            *(
                "conv_dim",
                "conv_alpha",
                "rank_dropout",
                "module_dropout",
                "loraplus_lr_ratio",
                "algo",
                "preset",
            ),
            *("factor", "use_tucker", "use_scalar", "dora_wd", "train_norm", "decompose_both", "bypass_mode"),
            *("img_attn_dim", "txt_attn_dim", "img_mlp_dim", "txt_mlp_dim", "img_mod_dim", "txt_mod_dim"),
            *("single_dim", "single_mod_dim", "in_dims", "ggpo_beta", "ggpo_sigma"),
        )
    },
}

# Tables of a dataset file; in a train file they would be taken for options.
DATASET_TABLES = frozenset({"datasets", "subsets"})
