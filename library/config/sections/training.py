"""[training] Length, batch, seed and precision of a run."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.options import Limit, option


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingConfig:
    """Length, batch, seed, precision."""

    max_train_steps: int = option(1600, "optimizer steps", limit=Limit(ge=1, unit="steps"), unset=(0,))
    max_train_epochs: int | None = option(
        None, "epochs; overrides max_train_steps", limit=Limit(ge=1, unit="epochs"), unset=(0,)
    )
    gradient_accumulation_steps: int = option(1, "micro-batches an optimizer step", limit=Limit(ge=1))
    global_batch_size: int | None = option(
        None,
        "images an optimizer step over all GPUs; the accumulation follows from it",
        limit=Limit(ge=1, unit="images"),
        ours=True,
    )
    seed: int | None = option(
        None, "seed of everything random; unset or -1 draws one", limit=Limit(ge=0), unset=(-1,)
    )
    mixed_precision: str = option(
        "no", "precision of the computation; bf16 for FLUX", choices=("no", "fp16", "bf16")
    )
    full_fp16: bool = option(False, "keep trained weights and gradients in fp16; needs mixed_precision fp16")
    full_bf16: bool = option(False, "keep trained weights and gradients in bf16; needs mixed_precision bf16")
