"""[sampling] Pictures drawn during training. Kohya's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingConfig:
    """`sample_prompts` is a file, one literal text, or a list of prompt lines."""

    sample_every_n_steps: int | None = None
    sample_at_first: bool = False
    sample_every_n_epochs: int | None = None
    sample_prompts: str | tuple[str, ...] | None = None
    sample_sampler: str = "ddim"
