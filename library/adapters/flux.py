"""FLUX as the trainer meets it: one root module, and the inputs of a step.

The root module owns the transformer, the network and those text encoders that run during training (trained, or not
cached). Its forward is the only way in: packing, position ids, text encoding, the transformer, unpacking. So a
backend that wraps this module sees every use of every trained parameter.

Shape letters: B samples, h w latent cells, N = h/2 * w/2 image tokens, L text tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from library import randomness
from library.adapters.base import Conditions, StepInputs
from library.data.records import Batch, TextCond, TokenIds
from library.flow.noise import on_device
from library.flow.path import image_ids, pack, unpack
from library.models.flux import Flux
from library.models.text_encoders import ClipL, T5Encoder
from library.models.tokenizers import FluxTokenizers

TEXT_LENGTHS = 64  # tokens: lengths of text without padding are multiples of it


@dataclass(frozen=True, slots=True, kw_only=True)
class ForwardSettings:
    """How the transformer is asked."""

    guidance_scale: float  # embedded guidance, only for models that embed it (dev)
    apply_t5_attn_mask: bool
    autocast_dtype: torch.dtype | None  # None: compute in the dtype of the weights
    train_clip_l: bool = False
    train_t5: bool = False


class FluxTrainModule(nn.Module):
    """Transformer, network and live text encoders behind one forward."""

    def __init__(
        self,
        *,
        transformer: Flux,
        network: nn.Module | None,
        clip_l: ClipL | None,
        t5: T5Encoder | None,
        settings: ForwardSettings,
    ) -> None:
        super().__init__()
        self.transformer = transformer
        self.network = network
        self.clip_l = clip_l
        self.t5 = t5
        self.settings = settings

    def train(self, mode: bool = True) -> FluxTrainModule:
        """Train mode for what is trained; frozen text encoders stay in eval mode (T5 has dropout of its own)."""
        super().train(mode)
        if self.clip_l is not None:
            self.clip_l.train(mode and self.settings.train_clip_l)
        if self.t5 is not None:
            self.t5.train(mode and self.settings.train_t5)
        return self

    def forward(
        self,
        x_t: Tensor,  # [B, 16, h, w]
        t: Tensor,  # [B] in (0, 1), float32
        cond: Conditions,
        guidance: Tensor | None = None,  # [B]
    ) -> Tensor:  # [B, 16, h, w]
        """The predicted velocity. `guidance` overrides the training value (sample images)."""
        height, width = x_t.shape[-2:]
        with self._autocast(x_t.device):
            text = self.encode(cond)
            if guidance is None and self.transformer.params.guidance_embed:
                guidance = torch.full_like(t, self.settings.guidance_scale)
            tokens = self.transformer(
                img=pack(x_t),
                img_ids=image_ids(len(x_t), height=height, width=width, device=x_t.device),
                txt=text.t5_hidden,
                txt_ids=torch.zeros(*text.t5_mask.shape, 3, device=x_t.device),
                timesteps=t,
                y=text.clip_pooled,
                guidance=guidance,
                txt_attention_mask=text.t5_mask
                if self.settings.apply_t5_attn_mask and cond.has_padding
                else None,
            )  # [B, N, 64]
        return unpack(tokens, height=height, width=width)

    def encode(self, cond: Conditions) -> TextCond:
        """Text conditions: the cached ones, with those of encoders that run here in their place."""
        text, tokens = cond.text, cond.tokens
        if tokens is None:
            assert text is not None, "conditions need cached text or tokens"
            return text
        pooled = text.clip_pooled if text is not None else None
        hidden = text.t5_hidden if text is not None else None
        if self.clip_l is not None:
            with _grad(self.settings.train_clip_l):
                pooled = self.clip_l(tokens.clip)
        if self.t5 is not None:
            with _grad(self.settings.train_t5):
                hidden = self.t5(tokens.t5, tokens.t5_mask if self.settings.apply_t5_attn_mask else None)
        assert pooled is not None, "no CLIP-L output"
        assert hidden is not None, "no T5 output"
        return TextCond(clip_pooled=pooled, t5_hidden=hidden, t5_mask=tokens.t5_mask)

    def _autocast(self, device: torch.device) -> AbstractContextManager[Any]:
        dtype = self.settings.autocast_dtype
        return torch.autocast(device.type, dtype=dtype) if dtype is not None else nullcontext()


@dataclass(frozen=True, slots=True, kw_only=True)
class FluxAdapter:
    """Batches to inputs on the device: the trainer's `ModelAdapter`."""

    device: torch.device
    tokenizers: FluxTokenizers | None  # set when a text encoder runs during training
    encode_images: Callable[[Tensor, Tensor | None], Tensor] | None  # set when latents are not cached
    seed: int
    drop_padding: bool = False  # apply_t5_attn_mask: padding is not looked at, so it need not be there

    def inputs(self, batch: Batch) -> StepInputs:
        latents = batch.latents
        if latents is None:
            assert batch.images is not None, "a batch has latents or images"
            assert self.encode_images is not None, "uncached images need the autoencoder"
            latents = self.encode_images(batch.images.to(self.device), posterior_noise(self.seed, batch))
        return StepInputs(
            latents=self._move(latents).float(),
            cond=self._conditions(batch),
            mask=None if batch.mask is None else self._move(batch.mask),
            sample_weights=self._move(batch.loss_weights * batch.shares),
        )

    def _conditions(self, batch: Batch) -> Conditions:
        text, tokens, has_padding = batch.text, self._tokens(batch.captions), True
        if text is not None and tokens is None and self.drop_padding:
            text = without_padding(text)
            has_padding = not bool(text.t5_mask.all())
        return Conditions(text=self._text(text), tokens=tokens, has_padding=has_padding)

    def _text(self, text: TextCond | None) -> TextCond | None:
        if text is None:
            return None
        return TextCond(
            clip_pooled=self._move(text.clip_pooled),
            t5_hidden=self._move(text.t5_hidden),
            t5_mask=self._move(text.t5_mask),
        )

    def _tokens(self, captions: tuple[str, ...]) -> TokenIds | None:
        if self.tokenizers is None:
            return None
        clip, t5, t5_mask = self.tokenizers.tokenize(captions)
        return TokenIds(clip=self._move(clip), t5=self._move(t5), t5_mask=self._move(t5_mask))

    def _move(self, tensor: Tensor) -> Tensor:
        return on_device(tensor, self.device)


def without_padding(text: TextCond) -> TextCond:
    """`text` without trailing tokens that are padding in every sample; lengths are multiples of 64.

    Masked tokens are looked at by no other token, so nothing that counts changes. Few lengths come up, because
    each is compiled and planned for.
    """
    used = text.t5_mask.bool().any(dim=0).nonzero()
    last = int(used.max()) + 1 if len(used) else 1
    length = min(text.t5_mask.shape[1], -(-last // TEXT_LENGTHS) * TEXT_LENGTHS)
    return replace(text, t5_hidden=text.t5_hidden[:, :length], t5_mask=text.t5_mask[:, :length])


def posterior_noise(seed: int, batch: Batch) -> Tensor:
    """Noise for sampling the autoencoder's posterior in an uncached step, [B, 16, h, w], keyed by visit."""
    assert batch.images is not None
    shape = (16, batch.images.shape[-2] // 8, batch.images.shape[-1] // 8)
    draws = [
        randomness.generator(seed, visit, "posterior").standard_normal(shape, dtype="float32")
        for visit in batch.visits
    ]
    return torch.stack([torch.from_numpy(draw) for draw in draws])


def _grad(enabled: bool) -> AbstractContextManager[Any]:
    return nullcontext() if enabled else torch.no_grad()
