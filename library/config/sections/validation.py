"""[validation] The loss on images that are not trained on."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.options import Limit, option


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidationConfig:
    """Validation loss."""

    validation_split: float = option(0.0, "share of the images kept for validation", limit=Limit(ge=0, le=1))
    validation_seed: int | None = option(
        None, "seed that picks these images; unset is seed", limit=Limit(ge=0)
    )
    validate_every_n_steps: int | None = option(
        None, "validate every n steps", limit=Limit(ge=1, unit="steps"), unset=(0,)
    )
    validate_every_n_epochs: int | None = option(
        None,
        "validate every n epochs; unset with a split is every epoch",
        limit=Limit(ge=1, unit="epochs"),
        unset=(0,),
    )
    max_validation_steps: int | None = option(
        None, "validation batches at most; unset is all", limit=Limit(ge=1, unit="batches"), unset=(0,)
    )
    keep_best: bool = option(
        False, "keep the adapter of the lowest validation loss as <output_name>-best, whatever else is removed",
        ours=True,
    )  # fmt: skip
    early_stop_patience: int | None = option(
        None,
        "end the run after this many validations without a new lowest loss",
        limit=Limit(ge=1, unit="validations"),
        unset=(0,),
        ours=True,
    )
    early_stop_min_delta: float = option(
        0.0, "how far below the lowest a validation loss must be to count as a new one", limit=Limit(ge=0),
        ours=True,
    )  # fmt: skip
