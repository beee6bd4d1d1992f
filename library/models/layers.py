"""The layers of the FLUX.1 transformer, with the attribute and class names of Black Forest Labs.

Names are interface: keys of checkpoints and of every adapter come from them, and plug-ins look for
`DoubleStreamBlock`, `SingleStreamBlock` and plain `nn.Linear`. Maths as in the FLUX.1 reference
implementation.

Shape letters: B batch, T text tokens, N image tokens, L = T + N, D hidden size, H heads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from library.models import norms
from library.models.gelu import GELU
from library.models.heads import EPSILON, Heads, join_streams, split_inner
from library.models.rope import Rotation, rotate

EMBEDDING_WIDTH = 256  # of the sinusoidal embedding of timestep and guidance


def sinusoidal_embedding(t: Tensor, *, width: int = EMBEDDING_WIDTH) -> Tensor:
    """Embed `t` [B], in (0, 1) for timesteps, as [B, width] float32: cosines, then sines, of 1000 t.

    Always float32: in bfloat16 1000 t has steps of 4 above 512, so the model would see another time than
    the one the noise was mixed for.
    """
    half = width // 2
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half
    )
    angles = 1000.0 * t.float().unsqueeze(-1) * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1)


def attention(heads: Heads, mask: Tensor | None) -> Tensor:
    """Attention of [B, H, L, D / H] queries, keys and values, as [B, L, D].

    `mask` is a boolean key mask [B, 1, 1, L], true where a token may be looked at, or None.
    """
    return rearrange(F.scaled_dot_product_attention(*heads, attn_mask=mask), "b h l d -> b l (h d)")


class MLPEmbedder(nn.Module):
    """Two Linear layers with a SiLU between them: [B, in_dim] to [B, hidden_dim]."""

    def __init__(self, in_dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_dim)
        self.silu = nn.SiLU()
        self.out_layer = nn.Linear(hidden_dim, hidden_dim)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out_layer(self.silu(self.in_layer(x)))
        return out


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis, computed in float32, in the input's dtype."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.scale.dtype:  # one kernel, which accumulates in float32
            return F.rms_norm(x, self.scale.shape, self.scale, EPSILON).to(x.dtype)
        return F.rms_norm(x.float(), self.scale.shape, self.scale.float(), EPSILON).to(x.dtype)


class QKNorm(nn.Module):
    """Normalisation of queries and keys, each with its own scale."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Those of queries and of keys, each [D / H]."""
        return self.query_norm.scale, self.key_norm.scale


def normalised(qkv: Tensor, norm: QKNorm, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Queries and keys, normalised, and values, each [B, H, L, D / H], of `qkv` [B, L, 3 D]."""
    q, k, v = rearrange(qkv, "b l (k h d) -> k b h l d", k=3, h=num_heads).unbind(0)
    q, k = norm(q, k)
    return q, k, v


def rotated(q: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> Heads:
    """Queries and keys turned by the tokens' positions, in the dtype of the values."""
    return Heads(rotate(q, rotation).to(v.dtype), rotate(k, rotation).to(v.dtype), v)


class SelfAttention(nn.Module):
    """The projections of one stream; the attention itself is joint and lives in the block."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, dim * 3, bias=qkv_bias)
        self.norm = QKNorm(dim // num_heads)
        self.proj = nn.Linear(dim, dim)


class ModulationOut(NamedTuple):
    """Shift, scale and gate of one residual branch, each [B, 1, D].

    Streams `x` and what branches make of them are [B, L, D]. With `one_pass` the operators of `library.models.norms`
    are taken.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor

    def enter(self, x: Tensor, norm: nn.Module, *, one_pass: bool) -> tuple[Tensor, Tensor]:
        """The stream, to go on with, and what the branch sees of it."""
        if one_pass:
            return norms.enter(x, self.shift, self.scale)
        return x, torch.addcmul(self.shift, 1 + self.scale, norm(x))

    def leave(self, x: Tensor, branch: Tensor, *, one_pass: bool) -> Tensor:
        """The stream after the branch."""
        return norms.leave(x, self.gate, branch) if one_pass else torch.addcmul(x, self.gate, branch)

    def leave_for(
        self, following: ModulationOut, x: Tensor, branch: Tensor, norm: nn.Module, *, one_pass: bool
    ) -> tuple[Tensor, Tensor]:
        """The stream after the branch, and what the following one sees of it."""
        if one_pass:
            return norms.leave_and_enter(x, self.gate, branch, following.shift, following.scale)
        return following.enter(self.leave(x, branch, one_pass=False), norm, one_pass=False)


class Modulation(nn.Module):
    """Shifts, scales and gates from the conditioning vector: one triple, or two for a double block."""

    def __init__(self, dim: int, *, double: bool) -> None:
        super().__init__()
        self.is_double = double
        self.lin = nn.Linear(dim, (6 if double else 3) * dim)

    def forward(self, vec: Tensor) -> tuple[ModulationOut, ...]:
        parts = self.lin(F.silu(vec)).unsqueeze(1).chunk(6 if self.is_double else 3, dim=-1)
        return tuple(ModulationOut(*parts[i : i + 3]) for i in range(0, len(parts), 3))


class DoubleStreamBlock(nn.Module):
    """Image and text streams with weights of their own and one joint attention."""

    one_pass = False  # whether the operators of `heads` and `norms` are taken where the block is compiled

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.img_mod = Modulation(hidden_size, double=True)
        self.img_norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPSILON)
        self.img_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.img_norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPSILON)
        self.img_mlp = _mlp(hidden_size, mlp_hidden)
        self.txt_mod = Modulation(hidden_size, double=True)
        self.txt_norm1 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPSILON)
        self.txt_attn = SelfAttention(hidden_size, num_heads, qkv_bias)
        self.txt_norm2 = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPSILON)
        self.txt_mlp = _mlp(hidden_size, mlp_hidden)

    @property
    def qk_norms(self) -> tuple[QKNorm, ...]:
        """The normalisations of queries and keys."""
        return self.img_attn.norm, self.txt_attn.norm

    @property
    def stream_norms(self) -> tuple[nn.Module, ...]:
        """Those in front of the branches."""
        return self.img_norm1, self.img_norm2, self.txt_norm1, self.txt_norm2

    def forward(
        self, img: Tensor, txt: Tensor, vec: Tensor, rotation: Rotation, mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """`img` [B, N, D] and `txt` [B, T, D] after the block; `rotation` and `mask` cover [txt, img]."""
        one_pass = self.one_pass and torch.compiler.is_compiling()
        img_attn_mod, img_mlp_mod = self.img_mod(vec)
        txt_attn_mod, txt_mlp_mod = self.txt_mod(vec)
        img, img_seen = img_attn_mod.enter(img, self.img_norm1, one_pass=one_pass)
        txt, txt_seen = txt_attn_mod.enter(txt, self.txt_norm1, one_pass=one_pass)
        img_qkv, txt_qkv = self.img_attn.qkv(img_seen), self.txt_attn.qkv(txt_seen)
        joint = attention(self._heads(txt_qkv, img_qkv, rotation, one_pass=one_pass), mask)
        txt_out, img_out = joint[:, : txt.shape[1]], joint[:, txt.shape[1] :]
        img, img_seen = img_attn_mod.leave_for(
            img_mlp_mod, img, self.img_attn.proj(img_out), self.img_norm2, one_pass=one_pass
        )
        img = img_mlp_mod.leave(img, self.img_mlp(img_seen), one_pass=one_pass)
        txt, txt_seen = txt_attn_mod.leave_for(
            txt_mlp_mod, txt, self.txt_attn.proj(txt_out), self.txt_norm2, one_pass=one_pass
        )
        txt = txt_mlp_mod.leave(txt, self.txt_mlp(txt_seen), one_pass=one_pass)
        return img, txt

    def _heads(self, txt_qkv: Tensor, img_qkv: Tensor, rotation: Rotation, *, one_pass: bool) -> Heads:
        """Normalised and rotated queries and keys, and values, of both streams."""
        txt, img, num_heads = self.txt_attn.norm, self.img_attn.norm, self.img_attn.num_heads
        if one_pass:
            return join_streams(txt_qkv, img_qkv, txt.scales, img.scales, rotation, num_heads)
        streams = (normalised(txt_qkv, txt, num_heads), normalised(img_qkv, img, num_heads))
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(*streams, strict=True))
        return rotated(q, k, v, rotation)


class SingleStreamBlock(nn.Module):
    """One stream of text and image tokens; attention and MLP side by side behind a shared Linear."""

    one_pass = False  # as in a double block

    def __init__(self, hidden_size: int, num_heads: int, mlp_hidden: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.num_heads = num_heads
        self.linear1 = nn.Linear(hidden_size, hidden_size * 3 + mlp_hidden)
        self.linear2 = nn.Linear(hidden_size + mlp_hidden, hidden_size)
        self.norm = QKNorm(hidden_size // num_heads)
        self.pre_norm = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPSILON)
        self.mlp_act = GELU()
        self.modulation = Modulation(hidden_size, double=False)

    @property
    def qk_norms(self) -> tuple[QKNorm, ...]:
        """The normalisation of queries and keys."""
        return (self.norm,)

    @property
    def stream_norms(self) -> tuple[nn.Module, ...]:
        """That in front of the branch."""
        return (self.pre_norm,)

    def forward(self, x: Tensor, vec: Tensor, rotation: Rotation, mask: Tensor | None = None) -> Tensor:
        """`x` [B, L, D] after the block."""
        one_pass = self.one_pass and torch.compiler.is_compiling()
        (mod,) = self.modulation(vec)
        x, seen = mod.enter(x, self.pre_norm, one_pass=one_pass)
        inner = self.linear1(seen)
        if one_pass:
            heads, mlp = split_inner(inner, self.norm.scales, rotation, self.num_heads)
        else:
            qkv, mlp = inner[..., : 3 * self.hidden_size], inner[..., 3 * self.hidden_size :]
            heads = rotated(*normalised(qkv, self.norm, self.num_heads), rotation)
            mlp = self.mlp_act(mlp)
        branch = self.linear2(torch.cat((attention(heads, mask), mlp), dim=-1))
        out: Tensor = mod.leave(x, branch, one_pass=one_pass)
        return out


class LastLayer(nn.Module):
    """Modulated normalisation and the projection to latent patches."""

    def __init__(self, hidden_size: int, out_channels: int) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(hidden_size, elementwise_affine=False, eps=EPSILON)
        self.linear = nn.Linear(hidden_size, out_channels)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden_size, 2 * hidden_size))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        """[B, N, D] to [B, N, out_channels]."""
        shift, scale = self.adaLN_modulation(vec).unsqueeze(1).chunk(2, dim=-1)
        out: Tensor = self.linear(torch.addcmul(shift, 1 + scale, self.norm_final(x)))
        return out


def _mlp(hidden_size: int, mlp_hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden_size, mlp_hidden), GELU(), nn.Linear(mlp_hidden, hidden_size))
