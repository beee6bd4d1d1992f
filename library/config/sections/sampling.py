"""[sampling] Sample images during training."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.kinds import PromptText
from library.config.options import Limit, no_effect, option


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """Sample images during training."""

    sample_prompts: PromptText | None = option(
        None, "prompt file (.txt, .toml, .json), or the prompts themselves, one a line"
    )
    sample_at_first: bool = option(False, "draw samples before the first step")
    sample_every_n_steps: int | None = option(
        None, "draw samples every n steps", limit=Limit(ge=1, unit="steps"), unset=(0, -1)
    )
    sample_every_n_epochs: int | None = option(
        None,
        "draw samples every n epochs; overrides sample_every_n_steps",
        limit=Limit(ge=1, unit="epochs"),
        unset=(0, -1),
    )
    sample_sampler: str = option(
        "ddim",
        "sampler of other model families",
        choices=(
            "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++",
            "dpmsingle", "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
        ),
        effect=no_effect("FLUX samples are always drawn with Euler steps"),
    )  # fmt: skip
