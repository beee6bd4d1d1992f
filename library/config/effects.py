"""What an option makes the run do, in few words: the right-hand column of a dry run.

A flag that is on does what its help says. Options with a value have a phrase here where their help does not say it
as well; {} in it is the value. A phrase that depends on other options is a function of the config.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from library.config.train_config import OPTIONS, TrainConfig

Phrase = str | Callable[[TrainConfig], str]


def effect_of(name: str, shown: str, config: TrainConfig) -> str:
    """What the option `name` does in this run; `shown` is its value in words, "-" if it has none."""
    row, value = OPTIONS[name].row, config.value(name)
    if row.effect.state == "none":
        return f"none: {row.effect.reason}"
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return row.help if value else "off"
    phrase = PHRASES.get(name, row.help)
    if callable(phrase):
        return phrase(config)
    return _singular(phrase.replace("{}", shown))


def _singular(text: str) -> str:
    """ "every 1 epochs" as "every epoch", "1 pictures" as "1 picture"."""
    return re.sub(r"\b1 (\w+)s\b", r"1 \1", re.sub(r"\bevery 1 (\w+)s\b", r"every \1", text))


def _resolution(config: TrainConfig) -> str:
    assert config.dataset.resolution is not None
    width, height = config.dataset.resolution
    return f"pictures are scaled to the area of {width}x{height}"


def _workers(config: TrainConfig) -> str:
    number = config.dataset.max_data_loader_n_workers
    return f"{number} processes prepare batches" if number else "the training process prepares batches itself"


def _length(steps: int | float) -> str:
    return f"{steps:.0%} of the run" if 0 < steps < 1 else f"{steps:g} steps"


def _scale(config: TrainConfig) -> str:
    network = config.network
    if network.network_dim is None:
        return "what the network adds is scaled by alpha / rank"
    return f"what the network adds is scaled by alpha / dim = {network.network_alpha / network.network_dim:g}"


def _shift(config: TrainConfig) -> str:
    uses = config.objective.timestep_sampling in ("shift", "sigma")
    return "moves timesteps towards noise" if uses else "not used by this timestep_sampling"


def _steps(config: TrainConfig) -> str:
    given = config.training.max_train_epochs is not None
    return (
        "not used: max_train_epochs decides"
        if given
        else f"stops after {config.training.max_train_steps} steps"
    )


def _sample_steps(config: TrainConfig) -> str:
    if config.sampling.sample_every_n_epochs:
        return "not used: sample_every_n_epochs decides"
    return f"draws the prompts every {config.sampling.sample_every_n_steps} steps"


def _report(config: TrainConfig) -> str:
    every = config.logging.report_every_n_steps
    return f"writes the page on the run every {every} steps" if every else "no page on the run is written"


def _schedule(config: TrainConfig) -> str:
    if config.schedule.lr_scheduler_type:
        return "not used: lr_scheduler_type decides"
    return f"the rate runs by {config.schedule.lr_scheduler} over the whole run"


def _weighting(config: TrainConfig) -> str:
    objective = config.objective
    uses = objective.timestep_sampling == "sigma" or objective.model_prediction_type == "sigma_scaled"
    return (
        "density of timesteps and weight of their loss" if uses else "not used with these timesteps and raw"
    )


def _huber(config: TrainConfig) -> str:
    uses = config.objective.loss_type in ("huber", "smooth_l1")
    return "shapes the huber loss" if uses else "not used by this loss_type"


def _precision(config: TrainConfig) -> str:
    precision = config.training.mixed_precision
    return f"computes in {'float32' if precision == 'no' else precision}"


def _recomputed(config: TrainConfig) -> str:
    memory = config.memory
    if not memory.gradient_checkpointing:
        return "not used without gradient_checkpointing"
    number = memory.recompute_blocks
    if number == "auto":
        return "as few blocks are recomputed as the GPU's memory allows"
    few = {0: "no block is", 1: "the first block is"}
    blocks = (
        few.get(number, f"the first {number} blocks are") if isinstance(number, int) else "all blocks are"
    )
    return f"{blocks} recomputed"


def _base_rate(config: TrainConfig) -> str:
    return "base rate" if config.optimizer.unet_lr is not None else "rate of every trained parameter"


PHRASES: Mapping[str, Phrase] = {
    "pretrained_model_name_or_path": "the transformer that the network is trained on",
    "clip_l": "gives the pooled vector of a caption",
    "t5xxl": "gives the tokens of a caption",
    "ae": "turns pictures into latents and back",
    "tokenizer_cache_dir": "tokenizers are read here, nothing is downloaded",
    "t5xxl_max_token_length": "captions are padded or cut to {} T5 tokens",
    "model_type": "FLUX.1",
    "network_module": "makes the layers that are trained",
    "network_dim": "rank {} in each trained layer",
    "network_alpha": _scale,
    "network_dropout": "drops a share of {} of the network's inputs",
    "network_args": "passed to the network module",
    "network_weights": "training begins with these weights",
    "base_weights": "merged into the base model before training",
    "base_weights_multiplier": "strength of each of base_weights",
    "scale_weight_norms": "shrinks a layer whose norm exceeds {}",
    "dataset_config": "names the pictures and how they are prepared",
    "train_data_dir": "pictures from its folders N_name, each N times an epoch",
    "reg_data_dir": "regularisation pictures from its folders N_name",
    "in_json": "captions come from this file",
    "dataset_repeats": "each picture {} times an epoch where nothing else is said",
    "resolution": _resolution,
    "train_batch_size": "{} pictures in each pass on each GPU",
    "min_bucket_reso": "no side of a bucket is shorter than {}",
    "max_bucket_reso": "no side of a bucket is longer than {}",
    "bucket_reso_steps": "sides of buckets are multiples of {}",
    "resize_interpolation": "pictures are resized by {}",
    "caption_extension": "captions are read from files ending in {}",
    "caption_extention": "the same as caption_extension",
    "caption_separator": 'tags are what stands between "{}"',
    "keep_tokens": "the first {} tags stay in place",
    "keep_tokens_separator": "tags before {} stay in place",
    "secondary_separator": "tags joined by {} stay together",
    "caption_prefix": "put before every caption",
    "caption_suffix": "put after every caption",
    "caption_dropout_rate": "a share of {} of the visits has no caption",
    "caption_dropout_every_n_epochs": "every {}. epoch has no captions",
    "caption_tag_dropout_rate": "a share of {} of the tags is dropped at each visit",
    "token_warmup_min": "a caption starts with {} tags where tags are warmed up",
    "token_warmup_step": "all tags are in use from step {}, below 1 from that share of the run",
    "face_crop_aug_range": "crops around faces, scaled by {}",
    "prior_loss_weight": "regularisation pictures weigh {} in the loss",
    "max_data_loader_n_workers": _workers,
    "vae_batch_size": "encodes {} pictures at once",
    "text_encoder_batch_size": "encodes {} captions at once",
    "timestep_sampling": "draws timesteps by {}",
    "sigmoid_scale": "width of the distribution of timesteps",
    "discrete_flow_shift": _shift,
    "weighting_scheme": _weighting,
    "logit_mean": "mean of weighting_scheme logit_normal",
    "logit_std": "width of weighting_scheme logit_normal",
    "mode_scale": "scale of weighting_scheme mode",
    "min_timestep": "no timestep below {} of 1000",
    "max_timestep": "no timestep above {} of 1000",
    "model_prediction_type": "the loss is taken on the model's output read as {}",
    "guidance_scale": "FLUX.1 dev is trained at guidance {}",
    "loss_type": "loss of each element: {}",
    "huber_schedule": _huber,
    "huber_c": _huber,
    "huber_scale": _huber,
    "ip_noise_gamma": "adds noise of strength {} to the input alone",
    "optimizer_type": "updates the parameters",
    "optimizer_args": "passed to the optimizer",
    "learning_rate": _base_rate,
    "unet_lr": "rate of the transformer's network",
    "text_encoder_lr": "rates of CLIP-L's and T5's networks",
    "max_grad_norm": "gradients longer than {} are scaled down, 0 leaves them",
    "lr_scheduler": _schedule,
    "lr_scheduler_type": "makes the schedule",
    "lr_scheduler_args": "passed to the schedule",
    "lr_warmup_steps": lambda config: f"the rate rises over {_length(config.schedule.lr_warmup_steps)}",
    "lr_decay_steps": lambda config: (
        f"the rate falls over the last {_length(config.schedule.lr_decay_steps)}"
    ),
    "lr_scheduler_num_cycles": "{} cycles of cosine_with_restarts",
    "lr_scheduler_power": "power of polynomial",
    "lr_scheduler_timescale": "time scale of inverse_sqrt: {} steps",
    "lr_scheduler_min_lr_ratio": "the rate never falls below a share of {}",
    "max_train_steps": _steps,
    "max_train_epochs": "stops after {} epochs",
    "gradient_accumulation_steps": "{} micro-batches make one optimizer step",
    "global_batch_size": "{} pictures make one optimizer step, over all GPUs",
    "seed": "decides every random choice",
    "mixed_precision": _precision,
    "recompute_blocks": _recomputed,
    "dynamo_backend": "compiles by {} where blocks are compiled",
    "ddp_timeout": "a rank that is silent for {} minutes ends the run",
    "output_dir": "what the run makes is written here",
    "output_name": "names of files begin with {}",
    "ema_decay": "files named -ema hold an average that keeps {} of itself at each step",
    "save_precision": "files hold {} numbers",
    "save_model_as": "files end in .{}",
    "save_every_n_epochs": "writes the network every {} epochs",
    "save_every_n_steps": "writes the network every {} steps",
    "save_n_epoch_ratio": "writes the network about {} times, at epoch ends",
    "save_last_n_epochs": "keeps files of the last {} epochs",
    "save_last_n_epochs_state": "keeps states of the last {} epochs",
    "save_last_n_steps": "keeps files of the last {} steps",
    "save_last_n_steps_state": "keeps states of the last {} steps",
    "resume": "goes on from this state",
    "initial_epoch": "begins at epoch {}",
    "initial_step": "begins after step {}",
    "logging_dir": "TensorBoard logs are written here",
    "log_with": "metrics go to {}",
    "log_prefix": "names of log folders begin with {}",
    "log_tracker_name": "name of the run in the log folder",
    "console_log_level": "messages below {} are not shown",
    "console_log_file": "messages are written here too",
    "sample_prompts": "what sample images show",
    "sample_every_n_steps": _sample_steps,
    "sample_every_n_epochs": "draws the prompts every {} epochs",
    "validation_split": "a share of {} of the pictures is only measured on",
    "validation_seed": "picks these pictures",
    "validate_every_n_steps": "takes the validation loss every {} steps",
    "validate_every_n_epochs": "takes the validation loss every {} epochs",
    "max_validation_steps": "validates on {} batches at most",
    "early_stop_patience": "ends after {} validations without a new lowest loss",
    "report_every_n_steps": _report,
    "config_file": "options are read from here",
    "dry_run_json": "this report is written here as JSON",
    "ignore_advice": "these pieces of advice are not given",
}
