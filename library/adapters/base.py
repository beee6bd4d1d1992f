"""What the trainer needs of a model family: inputs of a step from a batch, on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from library.data.records import Batch, TextCond, TokenIds


@dataclass(frozen=True, slots=True)
class Conditions:
    """What the prediction is conditioned on. `tokens` is set when an encoder runs inside the root module."""

    text: TextCond | None
    tokens: TokenIds | None
    has_padding: bool = True  # False where `text` is known to hold no padding, so that no mask is needed


@dataclass(frozen=True, slots=True)
class StepInputs:
    """One micro-batch on the training device."""

    latents: Tensor  # [B, 16, h, w] float32
    cond: Conditions
    mask: Tensor | None  # [B, 1, H, W] float32 in [0, 1]
    sample_weights: Tensor  # [B] float32: loss weight x share of the step


class ModelAdapter(Protocol):
    """The one call of the training loop that knows what a batch holds."""

    def inputs(self, batch: Batch) -> StepInputs:
        """Move a batch to the device; encode its images if they are not cached."""
        ...
