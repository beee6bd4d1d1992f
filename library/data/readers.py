"""What the dataset asks of caches. The caches live in a higher layer and are handed in as these Protocols."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from library.data.buckets import Size
from library.data.records import ImageRecord


@dataclass(frozen=True, slots=True)
class CachedLatents:
    """One image as the autoencoder sees it at one bucket."""

    latents: Tensor  # [16, h, w] float32
    mask: Tensor | None  # [H, W] float32 in 0..1, never mirrored


@dataclass(frozen=True, slots=True)
class CachedText:
    """The text encoders' outputs for one caption."""

    clip_pooled: Tensor  # [D_clip] float32
    t5_hidden: Tensor  # [L, D_t5] float32
    t5_mask: Tensor  # [L] int64


class LatentReader(Protocol):
    """Encoded images by record and bucket."""

    def read(self, record: ImageRecord, *, bucket: Size, flipped: bool, mask: bool) -> CachedLatents:
        """Latents of the image or of its mirror image; with its alpha mask if `mask`."""
        ...


class TextReader(Protocol):
    """Encoded captions by record."""

    def caption(self, record: ImageRecord, *, visit: int, step: int) -> str:
        """Which of the record's encoded captions a visit trains with, `step` being its optimizer step."""
        ...

    def read(self, record: ImageRecord, caption: str | None) -> CachedText:
        """Outputs for one of the record's captions, or for the empty one (None)."""
        ...
