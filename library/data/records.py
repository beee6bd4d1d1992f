"""The types that flow from the data layer to the training step. Frozen; made once, read everywhere.

Shape letters: B samples of a micro-batch, H W image pixels, h w latent cells (H/8, W/8), L text tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from library.randomness import Visit


@dataclass(frozen=True, slots=True)
class ImageRecord:
    """One image of one dataset, before repeats."""

    key: str  # "<dataset index>/<folder name>/<file name>": stable when the dataset moves to another disk
    path: Path
    size: tuple[int, int]  # width, height in pixels, after EXIF orientation
    caption: str  # raw text: every line if wildcards are on, else the first
    num_repeats: int
    dataset: int  # index into the resolved datasets
    subset: int  # index into that dataset's subsets
    is_reg: bool = False


@dataclass(frozen=True, slots=True)
class TextCond:
    """Outputs of the text encoders. `t5_mask` is the tokenizer's (1 = token, 0 = padding)."""

    clip_pooled: Tensor  # [B, D_clip]
    t5_hidden: Tensor  # [B, L, D_t5]
    t5_mask: Tensor  # [B, L] int64


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids as the encoders take them, padded and truncated."""

    clip: Tensor  # [B, 77] int64
    t5: Tensor  # [B, L] int64
    t5_mask: Tensor  # [B, L] int64


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one bucket. Either `latents` or `images` is set; `text` unless captions are encoded live."""

    visits: tuple[Visit, ...]  # B
    captions: tuple[str, ...]  # B, as processed for this visit
    latents: Tensor | None  # [B, 16, h, w] float32, scaled as the transformer takes them
    images: Tensor | None  # [B, 3, H, W] float32 in [-1, 1]
    text: TextCond | None
    loss_weights: Tensor  # [B] float32: 1, or prior_loss_weight for regularisation images
    shares: Tensor  # [B] float32: the sample's share of its optimizer step, 1/samples, or 0 for padding
    mask: Tensor | None  # [B, 1, H, W] float32 in [0, 1], weight of each pixel in the loss
