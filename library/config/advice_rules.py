"""What is allowed but hurts, as far as options alone tell: one function a rule, each piece of advice with a code.

A sentence says the value now, what it means and what is recommended; `advice` explains the codes. What needs data or
model files is advised on in `library.preflight`.
"""

from __future__ import annotations

from library.config.advice import MEANINGS
from library.config.names import suggestion
from library.config.rule_context import Context
from library.config.train_config import OPTIONS
from library.errors import ConfigError

TINY = "polyrank/tiny-flux"  # learns at rates that would ruin the real model
ADAPTIVE_OPTIMIZERS = ("prodigy", "dadapt")  # they find the rate themselves; learning_rate is a factor near 1
USUAL_RATES = (1e-6, 2e-3)  # per step, for optimizers of AdamW's kind


def ignored_codes_exist(context: Context) -> None:
    """A misspelt code would silence nothing."""
    for code in sorted(context.config.run.ignored_codes):
        if code not in MEANINGS:
            hint = suggestion(code, MEANINGS) or "; docs/advice.md lists them"
            raise ConfigError(f"{context.said('ignore_advice')}: {code!r} is not a code of advice{hint}")


def defaults_suit_flux(context: Context) -> None:
    """Kohya's defaults that hurt on FLUX keep their meaning and are named with the recommended value."""
    for code, name, meaning, recommended in FLUX_DEFAULTS:
        if not context.given(name):
            default = OPTIONS[name].row.default
            context.advise(
                code, f"{name} is not given and stays at {default}: {meaning}; recommended: {recommended}"
            )
    objective = context.config.objective
    if objective.timestep_sampling in ("shift", "sigma") and not context.given("discrete_flow_shift"):
        context.advise(
            "flux-shift",
            "discrete_flow_shift is not given and stays at 3.0: how far timesteps lean to noise; recommended: 3.1582",
        )


def mask_is_drawn_with(context: Context) -> None:
    """What a LoRA is trained with is what it is used with, elsewhere without the mask."""
    if context.config.model.apply_t5_attn_mask:
        context.advise(
            "t5-mask",
            f"{context.said('apply_t5_attn_mask')}: ComfyUI and diffusers draw without this mask, so pictures may "
            "differ there from the samples drawn here",
        )


def fp16_may_overflow(context: Context) -> None:
    """FLUX's activations go beyond what fp16 can hold."""
    if context.config.training.mixed_precision == "fp16":
        context.advise(
            "flux-fp16",
            f"{context.said('mixed_precision')}: FLUX can overflow in fp16, and the loss becomes NaN; "
            "recommended: bf16",
        )


def learning_rate_is_meant(context: Context) -> None:
    """The default of 2e-6 trains almost nothing; adaptive optimizers want about 1."""
    optimizer = context.config.optimizer
    adaptive = any(name in optimizer.optimizer_type.lower() for name in ADAPTIVE_OPTIMIZERS)
    rate = optimizer.learning_rate if optimizer.unet_lr is None else optimizer.unet_lr
    name = "learning_rate" if optimizer.unet_lr is None else "unet_lr"
    if not context.given(name):
        value = f"1.0 with {optimizer.optimizer_type}" if adaptive else "1e-4 for a LoRA"
        context.advise(
            "learning-rate-default",
            f"learning_rate is not given and stays at 2e-06: almost nothing is learnt; recommended: {value}",
        )
    elif adaptive and not 0.1 < rate < 10:
        context.advise(
            "learning-rate-adaptive",
            f"{context.said(name)}: {optimizer.optimizer_type} finds the rate itself and multiplies it by this; "
            "recommended: 1.0",
        )
    elif not adaptive and context.config.model.pretrained_model_name_or_path != TINY:
        if rate > USUAL_RATES[1]:
            context.advise(
                "learning-rate-high",
                f"{context.said(name)}: training is likely to diverge; recommended: 1e-4 to 4e-4",
            )
        elif 0 < rate < USUAL_RATES[0]:
            context.advise(
                "learning-rate-low",
                f"{context.said(name)}: almost nothing is learnt; recommended: 1e-4 to 4e-4",
            )


def text_encoder_training_is_meant(context: Context) -> None:
    """Kohya trains CLIP-L unless told not to; a rate for it has no effect where it is not trained."""
    if not context.config.network.network_train_unet_only:
        if not context.given("text_encoder_lr"):
            context.advise(
                "clip-l-trained",
                "CLIP-L is trained as well, with learning_rate, and stays in memory; recommended: "
                "network_train_unet_only = true, which trains the transformer alone",
            )
    elif context.given("text_encoder_lr"):
        context.advise(
            "text-encoder-lr-unused",
            f"{context.said('text_encoder_lr')} has no effect, as {context.said('network_train_unet_only')} trains "
            "no text encoder; remove one of them",
        )


def samples_are_drawn(context: Context) -> None:
    """Prompts without a schedule draw nothing."""
    sampling = context.config.sampling
    wanted = sampling.sample_at_first or sampling.sample_every_n_steps or sampling.sample_every_n_epochs
    if sampling.sample_prompts is not None and not wanted:
        context.advise(
            "samples-never",
            "sample_prompts is given, but no sample is drawn; set sample_every_n_steps or sample_every_n_epochs",
        )


# Code, option, what the default makes the run do, the recommended value.
FLUX_DEFAULTS = (
    ("flux-guidance", "guidance_scale", "FLUX.1 dev learns under strong guidance", "1.0"),
    (
        "flux-timesteps",
        "timestep_sampling",
        "timesteps are drawn without regard to how FLUX was trained",
        "shift or flux_shift",
    ),
    (
        "flux-prediction",
        "model_prediction_type",
        "the loss compares pictures instead of the velocity that FLUX predicts",
        "raw",
    ),
)

ADVICE_RULES = (
    ignored_codes_exist,
    defaults_suit_flux,
    mask_is_drawn_with,
    fp16_may_overflow,
    learning_rate_is_meant,
    text_encoder_training_is_meant,
    samples_are_drawn,
)
