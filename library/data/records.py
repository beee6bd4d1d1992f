"""The types that flow from the data layer to the training step. Frozen; made once, read everywhere.

Shape letters: B samples of a micro-batch, H W image pixels, h w latent cells (H/8, W/8), L text tokens, D
width.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from library.randomness import Visit


class ImageRecord(NamedTuple):
    """One image of one dataset, before repeats. A tuple, as a frozen dataclass takes four times as long to make."""

    key: str  # "<dataset index>/<folder name>/<file name>": stable when the dataset moves to another disk
    file: str  # its path as text: a hundred thousand Paths take a second to make
    size: tuple[int, int]  # width, height in pixels, after EXIF orientation
    caption: str  # raw text: every line if wildcards are on, else the first
    num_repeats: int
    dataset: int  # index into the resolved datasets
    subset: int  # index into that dataset's subsets
    is_reg: bool = False
    orientation: int = 1  # EXIF value that `size` and the pixels already honour; 1 is upright
    mask_path: Path | None = None  # picture of the same size whose red channel weighs the loss
    cache_name: str = ""  # stem of its cache files where another image has the same stem; "" is its own

    @property
    def path(self) -> Path:
        """Of the image."""
        return Path(self.file)

    @property
    def cache_base(self) -> str:
        """Path of its cache files up to the part that says what they hold; text, as a Path costs ten times as much."""
        if self.cache_name:
            return os.path.join(os.path.dirname(self.file), self.cache_name)
        return os.path.splitext(self.file)[0]


@dataclass(frozen=True, slots=True)
class TextCond:
    """Outputs of the text encoders. `t5_mask` is the tokenizer's (1 = token, 0 = padding)."""

    clip_pooled: Tensor  # [B, D_clip]
    t5_hidden: Tensor  # [B, L, D_t5]
    t5_mask: Tensor  # [B, L] int64

    def pin_memory(self) -> TextCond:
        """The same in page-locked memory."""
        return replace(
            self,
            clip_pooled=self.clip_pooled.pin_memory(),
            t5_hidden=self.t5_hidden.pin_memory(),
            t5_mask=self.t5_mask.pin_memory(),
        )


@dataclass(frozen=True, slots=True)
class TokenIds:
    """Token ids as the encoders take them, padded and truncated."""

    clip: Tensor  # [B, 77] int64
    t5: Tensor  # [B, L] int64
    t5_mask: Tensor  # [B, L] int64


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch of one bucket. Either `latents` or `images` is set; `text` unless captions are encoded
    live.
    """

    visits: tuple[Visit, ...]  # B
    captions: tuple[str, ...]  # B, as processed for this visit
    latents: Tensor | None  # [B, 16, h, w] float32, scaled as the transformer takes them
    images: Tensor | None  # [B, 3, H, W] float32 in [-1, 1]
    text: TextCond | None
    loss_weights: Tensor  # [B] float32: 1, or prior_loss_weight for regularisation images
    shares: Tensor  # [B] float32: the sample's share of its optimizer step, 1/samples, or 0 for padding
    mask: Tensor | None  # [B, 1, H, W] float32 in [0, 1], weight of each pixel in the loss
    # [B] bool: samples trained towards the frozen model's own answer; None in a run that has none of them
    preserve: Tensor | None = None

    def pin_memory(self) -> Batch:
        """The same in page-locked memory; torch's loader calls it by this name."""
        return replace(
            self,
            latents=_pinned(self.latents),
            images=_pinned(self.images),
            text=self.text.pin_memory() if self.text is not None else None,
            loss_weights=self.loss_weights.pin_memory(),
            shares=self.shares.pin_memory(),
            mask=_pinned(self.mask),
            preserve=_pinned(self.preserve),
        )


def _pinned(tensor: Tensor | None) -> Tensor | None:
    return tensor.pin_memory() if tensor is not None else None
