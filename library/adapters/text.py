"""Captions to text conditions outside the training step: for caches and sample prompts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch

from library.data.records import TextCond
from library.flow.noise import on_device
from library.models.text_encoders import ClipL, T5Encoder
from library.models.tokenizers import FluxTokenizers


class FluxTextEncoders:
    """Both encoders with their tokenizers. `encode` is deterministic and records no gradients."""

    def __init__(
        self,
        *,
        clip_l: ClipL,
        t5: T5Encoder,
        tokenizers: FluxTokenizers,
        apply_t5_attn_mask: bool,
        autocast_dtype: torch.dtype | None,
    ) -> None:
        self.clip_l, self.t5, self.tokenizers = clip_l, t5, tokenizers
        self._apply_mask, self._dtype = apply_t5_attn_mask, autocast_dtype

    @torch.no_grad()
    def encode(self, captions: Sequence[str]) -> TextCond:
        """Conditions of `captions`, on the encoders' device."""
        device = next(self.t5.parameters()).device
        clip, t5, t5_mask = (on_device(ids, device) for ids in self.tokenizers.tokenize(captions))
        autocast = (
            torch.autocast(device.type, dtype=self._dtype) if self._dtype is not None else nullcontext()
        )
        with autocast:
            pooled = self.clip_l(clip)
            hidden = self.t5(t5, t5_mask if self._apply_mask else None)
        return TextCond(clip_pooled=pooled, t5_hidden=hidden, t5_mask=t5_mask)
