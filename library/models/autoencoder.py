"""The FLUX.1 autoencoder: pictures to latents an eighth as wide and high, and back.

Attribute names are those of Black Forest Labs' `ae.safetensors` (244 tensors at full size), block structure
that of latent diffusion (Rombach et al. 2022). The scale and shift between posterior and transformer
latents are applied here and nowhere else, so what is cached or sampled needs no further treatment. Tiling
and slicing are left out.
"""

from __future__ import annotations

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from library.models.params import AutoEncoderParams

EPSILON = 1e-6


class ResnetBlock(nn.Module):
    """Two normalised convolutions beside an identity, or a 1x1 convolution where the width changes."""

    def __init__(self, in_channels: int, out_channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm1 = _norm(in_channels, num_groups)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = _norm(out_channels, num_groups)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        if in_channels != out_channels:
            self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1)
        self.changes_width = in_channels != out_channels

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        short: Tensor = self.nin_shortcut(x) if self.changes_width else x
        out: Tensor = short + h
        return out


class AttnBlock(nn.Module):
    """Single-head attention over all cells."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.norm = _norm(channels, num_groups)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        normed = self.norm(x)
        q, k, v = (rearrange(conv(normed), "b c h w -> b 1 (h w) c") for conv in (self.q, self.k, self.v))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b 1 (h w) c -> b c h w", h=x.shape[2])
        out: Tensor = x + self.proj_out(attended)
        return out


class Downsample(nn.Module):
    """Halve width and height; the padding is one row below and one column to the right."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)))
        return out


class Upsample(nn.Module):
    """Double width and height: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        return out


class Level(nn.Module):
    """Blocks of one resolution and the change to the next."""

    def __init__(self, block: list[ResnetBlock], resample: tuple[str, nn.Module] | None) -> None:
        super().__init__()
        self.block = nn.ModuleList(block)
        self.change = resample[0] if resample else None
        if resample:
            self.add_module(*resample)

    def forward(self, h: Tensor) -> Tensor:
        for block in self.block:
            h = block(h)
        return self.get_submodule(self.change)(h) if self.change else h


class Middle(nn.Module):
    """Block, attention, block at the lowest resolution."""

    def __init__(self, channels: int, num_groups: int) -> None:
        super().__init__()
        self.block_1 = ResnetBlock(channels, channels, num_groups)
        self.attn_1 = AttnBlock(channels, num_groups)
        self.block_2 = ResnetBlock(channels, channels, num_groups)

    def forward(self, h: Tensor) -> Tensor:
        out: Tensor = self.block_2(self.attn_1(self.block_1(h)))
        return out


class Encoder(nn.Module):
    """Pictures [B, 3, H, W] to mean and log-variance [B, 2 * z, H / 8, W / 8]."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        widths = [params.ch * factor for factor in params.ch_mult]
        groups, last = params.num_groups, len(widths) - 1
        self.conv_in = nn.Conv2d(params.in_channels, params.ch, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                _blocks(widths[i - 1] if i else params.ch, width, params.num_res_blocks, groups),
                ("downsample", Downsample(width)) if i != last else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], groups)
        self.norm_out = _norm(widths[-1], groups)
        self.conv_out = nn.Conv2d(widths[-1], 2 * params.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(self.mid(h))))
        return out


class Decoder(nn.Module):
    """Posterior samples [B, z, H / 8, W / 8] to pictures [B, 3, H, W]; level `up.0` has full resolution."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        widths = [params.ch * factor for factor in params.ch_mult]
        groups, last = params.num_groups, len(widths) - 1
        self.conv_in = nn.Conv2d(params.z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList(
            Level(
                _blocks(widths[min(i + 1, last)], width, params.num_res_blocks + 1, groups),
                ("upsample", Upsample(width)) if i else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = _norm(params.ch * params.ch_mult[0], groups)
        self.conv_out = nn.Conv2d(params.ch * params.ch_mult[0], params.in_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out


class AutoEncoder(nn.Module):
    """Encoder and decoder with the latents' scale and shift."""

    def __init__(self, params: AutoEncoderParams) -> None:
        super().__init__()
        self.params = params
        self.encoder = Encoder(params)
        self.decoder = Decoder(params)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """Latents [B, z, H / 8, W / 8] of `images` [B, 3, H, W] in -1..1; H and W are multiples of 8.

        `noise`, standard normal of the latents' shape, draws from the posterior; None gives its mean. The
        result is scaled as the transformer takes it.
        """
        mean, logvar = self.encoder(images).chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise
        latents: Tensor = self.params.scale_factor * (z - self.params.shift_factor)
        return latents

    def decode(self, latents: Tensor) -> Tensor:
        """Pictures [B, 3, 8 h, 8 w], about -1..1 and not clamped, of scaled `latents` [B, z, h, w]."""
        out: Tensor = self.decoder(latents / self.params.scale_factor + self.params.shift_factor)
        return out


def _norm(channels: int, num_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, channels, eps=EPSILON)


def _blocks(in_channels: int, out_channels: int, number: int, num_groups: int) -> list[ResnetBlock]:
    return [ResnetBlock(out_channels if i else in_channels, out_channels, num_groups) for i in range(number)]
