"""Small models of random weights, and measures, shared by the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from library.models import few_rows, frozen
from library.models.autoencoder import AutoEncoder
from library.models.flux import Flux
from library.models.params import AutoEncoderParams, FluxParams, rotary_axes

DATA = Path(__file__).parents[1] / "data" / "models"

TINY_AE = AutoEncoderParams(ch=32, ch_mult=(1, 2, 2), num_res_blocks=1)


def flux_params(
    *, head: int = 16, heads: int = 2, depth: int = 2, singles: int = 1, guidance: bool = True
) -> FluxParams:
    return FluxParams(
        in_channels=64,
        out_channels=64,
        vec_in_dim=24,
        context_in_dim=40,
        hidden_size=head * heads,
        num_heads=heads,
        mlp_hidden=4 * head * heads,
        depth=depth,
        depth_single_blocks=singles,
        axes_dim=rotary_axes(head),
        guidance_embed=guidance,
    )


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Fill every parameter, norms and biases too, so that none can be ignored unseen."""
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=source)
            if "norm" in name and not name.endswith("bias"):
                parameter.copy_(1 + 0.2 * noise)
            else:
                parameter.copy_(noise * 0.7 / max(1, parameter[0].numel() if parameter.ndim else 1) ** 0.5)
    return model


def random_flux(params: FluxParams, seed: int = 0) -> Flux:
    model = randomise(Flux(params), seed)
    assert isinstance(model, Flux)
    return model.eval()


def random_autoencoder(params: AutoEncoderParams = TINY_AE, seed: int = 0) -> AutoEncoder:
    model = randomise(AutoEncoder(params), seed)
    assert isinstance(model, AutoEncoder)
    return model.eval()


def flux_inputs(
    params: FluxParams, *, batch: int = 2, grid: tuple[int, int] = (3, 4), text: int = 5
) -> dict[str, Tensor]:
    source = torch.Generator().manual_seed(7)
    rows, columns = grid
    ids = torch.zeros(batch, rows * columns, 3)
    ids[..., 1] = torch.arange(rows).repeat_interleave(columns)
    ids[..., 2] = torch.arange(columns).repeat(rows)
    return {
        "img": torch.randn(batch, rows * columns, params.in_channels, generator=source),
        "img_ids": ids,
        "txt": torch.randn(batch, text, params.context_in_dim, generator=source),
        "txt_ids": torch.zeros(batch, text, 3),
        "timesteps": torch.rand(batch, generator=source),
        "y": torch.randn(batch, params.vec_in_dim, generator=source),
        "guidance": torch.tensor([1.0, 3.5])[:batch],
    }


def difference(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference, relative to the largest magnitude of `b`."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()


def wide_weight(linear: nn.Linear) -> Tensor:
    """The weight [out, in] that the layer multiplies with, in float32."""
    weight = linear.weight.detach()
    if frozen.is_grouped(linear):
        return few_rows.widened(weight, linear.group_scale.float(), torch.float32)
    return weight.float() * linear.weight_scale.T if frozen.is_scaled(linear) else weight.float()
