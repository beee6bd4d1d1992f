"""[objective] Timesteps, prediction and loss. Flow time t runs from 0 (image) to 1 (noise)."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.options import Limit, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectiveConfig:
    """Timestep sampling, prediction, loss."""

    timestep_sampling: str = option(
        "sigma",
        "how timesteps are drawn; shift or flux_shift is recommended",
        choices=("sigma", "uniform", "sigmoid", "shift", "flux_shift"),
    )
    sigmoid_scale: float = option(1.0, "width of sigmoid, shift and flux_shift sampling")
    discrete_flow_shift: float = option(
        3.0, "shift of shift and sigma sampling; 3.1582 is recommended", limit=Limit(gt=0)
    )
    weighting_scheme: str = option(
        "uniform",
        "density of sigma sampling and loss weight of sigma_scaled prediction",
        choices=("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
    )
    logit_mean: float = option(0.0, "mean for weighting_scheme logit_normal")
    logit_std: float = option(1.0, "standard deviation for weighting_scheme logit_normal", limit=Limit(gt=0))
    mode_scale: float = option(1.29, "scale for weighting_scheme mode")
    min_timestep: int | None = option(
        None, "lowest timestep; the distribution is squeezed into the range", limit=Limit(ge=0, le=1000)
    )
    max_timestep: int | None = option(
        None, "highest timestep; the distribution is squeezed into the range", limit=Limit(ge=1, le=1000)
    )
    model_prediction_type: str = option(
        "sigma_scaled",
        "how the output is read; raw is recommended",
        choices=("raw", "additive", "sigma_scaled"),
    )
    guidance_scale: float = option(
        3.5, "guidance value FLUX.1 dev is trained at; 1.0 is recommended", limit=Limit(ge=0)
    )
    loss_type: str = option("l2", "loss of each element", choices=("l1", "l2", "huber", "smooth_l1"))
    huber_schedule: str = option(
        "snr",
        "how huber_c depends on the timestep; with FLUX constant or exponential",
        choices=("constant", "exponential", "snr"),
    )
    huber_c: float = option(0.1, "where huber and smooth_l1 turn from square to linear", limit=Limit(gt=0))
    huber_scale: float = option(1.0, "scale of huber_c", limit=Limit(gt=0))
    ip_noise_gamma: float | None = option(
        None, "strength of noise added to the input only", limit=Limit(ge=0)
    )
    ip_noise_gamma_random_strength: bool = option(False, "draw that strength between 0 and ip_noise_gamma")
