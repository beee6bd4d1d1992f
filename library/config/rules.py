"""Checks over several options, one function a rule. They look at options and at whether named files exist.

What is allowed but hurts is in `advice_rules`. What depends on the resolved datasets is checked in
`dataset_rules`; what needs a model file, at its loading.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from library.config.advice_rules import ADVICE_RULES
from library.config.averaging_rules import AVERAGING_RULES
from library.config.kinds import local_path
from library.config.launcher import ACCELERATE
from library.config.names import files_near, suggestion
from library.config.notices import Notices
from library.config.ranks import num_gpus_fits
from library.config.rule_context import Context
from library.config.sections.schedule import LR_SCHEDULERS
from library.config.service_rules import AUTO, SERVICE_RULES
from library.config.train_config import TrainConfig
from library.config.zero_limits import check_zero_limits
from library.errors import ConfigError

FLUX_MODULE = "networks.lora_flux"
OTHER_MODULES = {
    "networks.lora": "Stable Diffusion",
    "networks.lora_fa": "Stable Diffusion",
    "networks.dylora": "Stable Diffusion",
    "networks.oft": "Stable Diffusion XL",
    "networks.lora_sd3": "Stable Diffusion 3",
    "networks.lora_lumina": "Lumina",
}
GONE_BACKENDS = ("aot_ts_nvfuser", "nvprims_nvfuser", "ofi", "fx2trt", "tensort")
PROMPT_FILES = (".txt", ".toml", ".json")
# Seen to give NaN at the first step on fp16 weights
NOT_IN_FP16 = frozenset(
    {"adamw", "adamw_torch", "adamw_torch_fused", "adam", "nadam", "adamax", "rmsprop", "adagrad",
     "adamwschedulefree"}
)  # fmt: skip


def check(config: TrainConfig, sources: Mapping[str, str], notices: Notices) -> None:
    """Apply every rule. Raises ConfigError for the first broken; the rest goes to `notices`."""
    notices.ignored = config.run.ignored_codes
    context = Context(config, sources, notices)
    for rule in (*RULES, *ADVICE_RULES):
        rule(context)


def network_module_is_for_flux(context: Context) -> None:
    """An adapter module must be named, and not another model family's."""
    module = context.config.network.network_module
    if module is None:
        raise ConfigError(f"network_module is missing: give {FLUX_MODULE}, or lycoris.kohya for LyCORIS")
    if module in OTHER_MODULES:
        family = OTHER_MODULES[module]
        raise ConfigError(
            f"{context.said('network_module')} is the module for {family}; FLUX's is {FLUX_MODULE}"
        )


def model_files_are_named(context: Context) -> None:
    """The base model is needed; beside a single transformer file, so are the other three."""
    model = context.config.model
    base = model.pretrained_model_name_or_path
    if base is None:
        raise ConfigError("pretrained_model_name_or_path is missing: give the FLUX.1 transformer file")
    files = {"clip_l": model.clip_l, "t5xxl": model.t5xxl, "ae": model.ae}
    missing = [name for name, value in files.items() if value is None]
    if missing and Path(base).suffix in (".safetensors", ".sft"):
        raise ConfigError(f"{' and '.join(missing)} missing: the file {base} holds the transformer only")


def output_has_a_place(context: Context) -> None:
    """Nothing can be saved without output_dir, nor can TensorBoard write without logging_dir."""
    if context.config.saving.output_dir is None:
        raise ConfigError("output_dir is missing: give the folder for adapter files")
    log_with = context.config.logging.log_with
    if log_with in ("tensorboard", "all") and context.config.logging.logging_dir is None:
        raise ConfigError(f"{context.said('log_with')} needs logging_dir: give the folder for the logs")


def output_can_be_written(context: Context) -> None:
    """Said before hours of training end at a file that cannot be made."""
    named = {
        "output_dir": context.config.saving.output_dir,
        "logging_dir": context.config.logging.logging_dir,
    }
    for name, folder in named.items():
        if folder is None:
            continue
        place = next(parent for parent in (folder.absolute(), *folder.absolute().parents) if parent.exists())
        if not place.is_dir():
            raise ConfigError(f"{context.said(name)}: {place} is a file, not a folder; name another folder")
        if not os.access(place, os.W_OK | os.X_OK):
            raise ConfigError(
                f"{context.said(name)}: nothing can be written into {place}; name another folder"
            )


def data_has_one_source(context: Context) -> None:
    """One of dataset_config, in_json and train_data_dir; the first of them wins, as in Kohya."""
    data = context.config.dataset
    if context.config.dataset_tables is not None:
        return
    if not (data.dataset_config or data.in_json or data.train_data_dir):
        raise ConfigError(
            "no data: give train_data_dir (a folder with sub-folders such as 10_name) or dataset_config"
        )
    names = ("train_data_dir", "reg_data_dir", "in_json")
    ignored = [context.said(name) for name in names if data.dataset_config and context.given(name)]
    if ignored:
        context.notices.remarks.append(f"dataset_config names the data, so ignored: {', '.join(ignored)}")
    elif data.in_json and data.reg_data_dir:
        context.notices.remarks.append(f"in_json names the data, so ignored: {context.said('reg_data_dir')}")


def named_files_exist(context: Context) -> None:
    """Local files and folders that the run starts from must be there."""
    config = context.config
    named: list[tuple[str, Path | None]] = [
        ("network_weights", config.network.network_weights),
        ("dataset_config", config.dataset.dataset_config),
        ("log_tracker_config", config.logging.log_tracker_config),
        *(("base_weights", path) for path in config.network.base_weights),
    ]
    # "auto" is the newest state of output_dir, if there is one.
    if config.saving.resume != AUTO and not config.saving.resume_from_huggingface:
        named.append(("resume", config.saving.resume))
    for name, path in named:
        if path is not None and not path.exists():
            raise ConfigError(f"{name} ({context.sources[name]}): {path} does not exist{files_near(path)}")


def masks_are_weighed(context: Context) -> None:
    """conditioning_data_dir holds the masks of train_data_dir or in_json, for masked_loss."""
    data = context.config.dataset
    if data.conditioning_data_dir is None:
        return
    if data.dataset_config is not None:
        context.notices.remarks.append(
            f"dataset_config names the masks of each subset, so ignored: {context.said('conditioning_data_dir')}"
        )
    elif not data.masked_loss:
        context.notices.remarks.append(
            f"without masked_loss no effect: {context.said('conditioning_data_dir')}"
        )


def constant_schedule_has_no_warmup(context: Context) -> None:
    """Kohya refuses it too; optimizers that bring their own schedule take none."""
    schedule = context.config.schedule
    own_schedule = context.config.optimizer.optimizer_type.lower().endswith("schedulefree")
    if schedule.lr_scheduler == "constant" and schedule.lr_warmup_steps and not schedule.lr_scheduler_type:
        if own_schedule:
            return
        raise ConfigError(
            f"{context.said('lr_warmup_steps')} contradicts lr_scheduler = 'constant': "
            "use constant_with_warmup, or remove the warm-up"
        )


def schedule_is_known(context: Context) -> None:
    """Said here, as the schedule is made after the models are loaded. `adafactor:...` sets itself."""
    schedule = context.config.schedule
    name = schedule.lr_scheduler
    if not schedule.lr_scheduler_type and name not in LR_SCHEDULERS and not name.startswith("adafactor"):
        hint = suggestion(name, LR_SCHEDULERS) or "; known are " + ", ".join(LR_SCHEDULERS)
        raise ConfigError(f"{context.said('lr_scheduler')} is not a known schedule{hint}")


def huber_has_a_schedule(context: Context) -> None:
    """The default schedule `snr` needs the noise schedule of other model families."""
    objective = context.config.objective
    if objective.loss_type in ("huber", "smooth_l1") and objective.huber_schedule == "snr":
        raise ConfigError(
            f"{context.said('loss_type')} cannot use huber_schedule 'snr' with FLUX: "
            "set huber_schedule to exponential or constant"
        )


def precision_fits(context: Context) -> None:
    """16-bit weights need their own computation, fp8 storage a 16-bit one."""
    training, memory = context.config.training, context.config.memory
    for name, needed in (("full_bf16", "bf16"), ("full_fp16", "fp16")):
        if context.config.value(name) and training.mixed_precision != needed:
            raise ConfigError(
                f"{context.said(name)} needs mixed_precision {needed}, not {training.mixed_precision}"
            )
    if memory.fp8_base and training.mixed_precision == "no":
        raise ConfigError(
            f"{context.said('fp8_base')} needs mixed_precision bf16 or fp16: set mixed_precision to bf16"
        )
    if memory.base_compute != "bf16" and training.mixed_precision == "no":
        raise ConfigError(
            f"{context.said('base_compute')} needs mixed_precision bf16 or fp16: set mixed_precision to bf16"
        )


def cheap_recomputation_has_a_compiler(context: Context) -> None:
    """What is cheap is told apart within compiled blocks."""
    memory = context.config.memory
    if memory.recompute == "cheap" and not (memory.gradient_checkpointing and memory.compile_blocks != "off"):
        context.notices.remarks.append(
            f"{context.said('recompute')} has no effect: it needs gradient_checkpointing and compile_blocks"
        )


def counted_blocks_are_recomputed(context: Context) -> None:
    """A number of recomputed blocks needs recomputation, and memory is measured on a GPU that holds the model."""
    memory, parts, said = context.config.memory, context.config.distributed, context.said("recompute_blocks")
    remarks = context.notices.remarks
    if memory.recompute_blocks is not None and not memory.gradient_checkpointing:
        remarks.append(f"{said} has no effect: it needs gradient_checkpointing")
    elif memory.recompute_blocks == "auto" and parts.uses_deepspeed and parts.zero_stage == 3:
        remarks.append(
            f"{said} recomputes all blocks with zero_stage 3, where no GPU holds the model: give a number"
        )
    elif memory.recompute_blocks == 0 and memory.cpu_offload_checkpointing:
        remarks.append(
            f"cpu_offload_checkpointing has no effect: {said} keeps all blocks, and it moves inputs of recomputed ones"
        )


def base_weights_can_be_read(context: Context) -> None:
    """GGPO measures the rows of base weights, which scales are no part of."""
    memory, words = context.config.memory, context.config.network.network_args
    if memory.base_compute != "bf16" and any(word.strip().startswith("ggpo_") for word in words):
        raise ConfigError(
            f"network_args ggpo_sigma and ggpo_beta cannot be used with {context.said('base_compute')}: "
            "set base_compute to bf16"
        )


def optimizer_fits_half_weights(context: Context) -> None:
    """Averages of squared gradients, kept in the weights' dtype, become 0 in fp16, and steps 0 / 0."""
    name = context.config.optimizer.optimizer_type.lower().rpartition(".")[2] or "adamw"
    if context.config.training.full_fp16 and name in NOT_IN_FP16:
        raise ConfigError(
            f"{context.said('full_fp16')} ends in NaN with {context.said('optimizer_type')}, whose averages do "
            "not fit into fp16: use AdamW8bit, Adafactor or Lion, or full_bf16"
        )


def length_is_given_once(context: Context) -> None:
    """Epochs win over steps, as in Kohya."""
    training, saving = context.config.training, context.config.saving
    if training.max_train_epochs is not None and context.given("max_train_steps"):
        context.notices.remarks.append(
            f"{context.said('max_train_epochs')} decides the "
            f"length, so ignored: {context.said('max_train_steps')}"
        )
    elif training.max_train_epochs is None and (saving.initial_step or 0) >= training.max_train_steps:
        raise ConfigError(
            f"{context.said('initial_step')} is not below max_train_steps = {training.max_train_steps}"
        )


def batch_is_given_once(context: Context) -> None:
    """global_batch_size decides the accumulation."""
    training = context.config.training
    if training.global_batch_size and training.gradient_accumulation_steps > 1:
        raise ConfigError(
            f"{context.said('gradient_accumulation_steps')} contradicts {context.said('global_batch_size')}, "
            "which decides the accumulation: give one of them"
        )


def network_parts_fit(context: Context) -> None:
    """What is trained, and which weights it starts from."""
    network = context.config.network
    if network.network_train_unet_only and network.network_train_text_encoder_only:
        raise ConfigError(
            f"{context.said('network_train_unet_only')} and "
            f"{context.said('network_train_text_encoder_only')} "
            "leave nothing to train: give one of them"
        )
    if network.dim_from_weights and network.network_weights is None:
        raise ConfigError(
            f"{context.said('dim_from_weights')} needs network_weights: give the file with the ranks"
        )
    if len(network.base_weights_multiplier) > len(network.base_weights):
        raise ConfigError(
            f"{context.said('base_weights_multiplier')} has more values than base_weights has files "
            f"({len(network.base_weights)})"
        )


def text_encoder_training_fits(context: Context) -> None:
    """T5 is trained only when its outputs are computed live; at most two learning rates are known."""
    config, network = context.config, context.config.network
    cached = config.caching.cache_text_encoder_outputs
    if network.wants_t5 and cached and not network.network_train_unet_only:
        raise ConfigError(
            f"network_args train_t5xxl=True ({context.sources['network_args']}) cannot be used with "
            f"{context.said('cache_text_encoder_outputs')}: T5's outputs change while it is trained"
        )
    rates = config.optimizer.text_encoder_lr or ()
    if len(rates) > 2:
        raise ConfigError(f"{context.said('text_encoder_lr')}: give one value, or two for CLIP-L and T5")


def timesteps_are_a_range(context: Context) -> None:
    """The distribution is squeezed between the two."""
    least, most = context.config.objective.min_timestep, context.config.objective.max_timestep
    if least is not None and most is not None and least > most:
        raise ConfigError(f"{context.said('min_timestep')} is above {context.said('max_timestep')}")


def backend_exists(context: Context) -> None:
    """Kohya's list of compilers is older than torch's."""
    memory = context.config.memory
    if memory.compile_blocks != "off" and memory.dynamo_backend in GONE_BACKENDS:
        raise ConfigError(
            f"{context.said('dynamo_backend')} is no longer part of torch: use inductor, or leave it out"
        )


def backend_is_named_once(context: Context) -> None:
    """An explicit backend wins over accelerate's settings, and contradicts --deepspeed."""
    chosen = context.config.distributed
    if chosen.distributed not in ("single", "ddp") or not chosen.deepspeed:
        return
    if context.sources["deepspeed"] != ACCELERATE:
        raise ConfigError(
            f"{context.said('distributed')} contradicts {context.said('deepspeed')}: give one of them"
        )
    context.notices.remarks.append(f"{context.said('distributed')}, so accelerate's DeepSpeed is not used")


def deepspeed_fits(context: Context) -> None:
    """What does not go together with ZeRO; options of DeepSpeed alone say nothing without it."""
    check_zero_limits(context.config)
    names = ("zero_stage", "offload_optimizer_device", "offload_param_device")
    idle = [context.said(name) for name in names if context.given(name)]
    if idle and not context.config.distributed.uses_deepspeed:
        context.notices.remarks.append(f"no effect without deepspeed: {', '.join(idle)}")
    if context.config.distributed.offload_optimizer_device == "nvme":
        context.notices.remarks.append(f"{context.said('offload_optimizer_device')} is read as cpu")


def start_is_given_once(context: Context) -> None:
    """A saved state knows its step; initial_epoch and initial_step are for runs without one."""
    ignored = [context.said(name) for name in ("initial_epoch", "initial_step") if context.given(name)]
    if context.config.saving.resume is not None and ignored:
        context.notices.remarks.append(
            f"the state that {context.said('resume')} finds decides the start, so ignored: "
            + ", ".join(ignored)
        )


def samples_have_prompts(context: Context) -> None:
    """Sampling needs prompts; a name that looks like a prompt file must be one."""
    sampling = context.config.sampling
    wishes = ("sample_at_first", "sample_every_n_steps", "sample_every_n_epochs")
    wish = next((name for name in wishes if context.config.value(name)), None)
    prompts = sampling.sample_prompts
    if wish and prompts is None:
        raise ConfigError(f"{context.said(wish)} needs sample_prompts: give a prompt file or a prompt")
    if prompts is None or not wish:
        return
    is_name = "\n" not in prompts and prompts.lower().endswith(PROMPT_FILES)
    if is_name and not (path := local_path(prompts)).is_file():
        raise ConfigError(f"{context.said('sample_prompts')}: there is no such file{files_near(path)}")


RULES = (
    network_module_is_for_flux,
    model_files_are_named,
    output_has_a_place,
    output_can_be_written,
    data_has_one_source,
    named_files_exist,
    *SERVICE_RULES,
    *AVERAGING_RULES,
    masks_are_weighed,
    constant_schedule_has_no_warmup,
    schedule_is_known,
    huber_has_a_schedule,
    precision_fits,
    base_weights_can_be_read,
    cheap_recomputation_has_a_compiler,
    counted_blocks_are_recomputed,
    optimizer_fits_half_weights,
    length_is_given_once,
    batch_is_given_once,
    network_parts_fit,
    text_encoder_training_fits,
    timesteps_are_a_range,
    backend_exists,
    backend_is_named_once,
    num_gpus_fits,
    deepspeed_fits,
    start_is_given_once,
    samples_have_prompts,
)
