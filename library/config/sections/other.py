"""[other] Options of other model families. They are accepted, because shared config files carry them."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.options import no_effect, option, refused

OTHER_FAMILY = no_effect("it belongs to other model families")
FLUX_NOISE = no_effect("FLUX is trained with plain Gaussian noise")
FLUX_LOSS = no_effect("it belongs to the loss of other model families")


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherFamilyConfig:
    """Options of other model families; no effect on FLUX."""

    v2: bool = option(False, "the base model is Stable Diffusion 2", effect=OTHER_FAMILY)
    v_parameterization: bool = option(False, "the base model predicts v", effect=OTHER_FAMILY)
    max_token_length: int | None = option(
        None, "CLIP tokens a caption", choices=(150, 225), effect=OTHER_FAMILY
    )
    vae: str | None = option(None, "autoencoder of Stable Diffusion; FLUX's is --ae", effect=OTHER_FAMILY)
    clip_skip: int | None = option(None, "CLIP layers left out", effect=OTHER_FAMILY)
    controlnet_model_name_or_path: str | None = option(None, "ControlNet model", effect=OTHER_FAMILY)
    zero_terminal_snr: bool = option(False, "rescale the noise schedule", effect=OTHER_FAMILY)
    weighted_captions: bool = option(
        False,
        "(word:1.2) weights words",
        effect=refused(
            "FLUX's text encoders take no word weights; remove it and the brackets from the captions"
        ),
    )
    scale_v_pred_loss_like_noise_pred: bool = option(
        False, "scale the loss of v prediction", effect=FLUX_LOSS
    )
    v_pred_like_loss: float | None = option(None, "add a loss of v prediction", effect=FLUX_LOSS)
    min_snr_gamma: float | None = option(None, "weight timesteps by signal to noise", effect=FLUX_LOSS)
    debiased_estimation_loss: bool = option(False, "debiased estimation loss", effect=FLUX_LOSS)
    noise_offset: float | None = option(None, "shift the noise of whole channels", effect=FLUX_NOISE)
    noise_offset_random_strength: bool = option(False, "draw that shift's strength", effect=FLUX_NOISE)
    adaptive_noise_scale: float | None = option(
        None, "add the latents' mean to that shift", effect=FLUX_NOISE
    )
    multires_noise_iterations: int | None = option(
        None, "layers of multi-resolution noise", effect=FLUX_NOISE
    )
    multires_noise_discount: float = option(0.3, "discount of these layers", effect=FLUX_NOISE)
