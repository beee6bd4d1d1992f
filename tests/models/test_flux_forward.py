"""The transformer against recorded numbers and against diffusers."""

from __future__ import annotations

import pytest
import torch
from diffusers import FluxTransformer2DModel
from model_examples import DATA, difference, flux_inputs, flux_params, random_flux
from torch import nn

from library.files.safetensors import load_file
from library.models.flux import Flux
from library.models.key_maps import flux_to_diffusers
from library.models.layers import sinusoidal_embedding
from library.models.load import load_flux
from library.models.params import FluxParams, rotary_axes
from library.models.rope import rotate, rotations


@pytest.fixture(scope="module")
def recorded():
    return load_file(DATA / "inputs.safetensors"), load_file(DATA / "outputs.safetensors")


def as_diffusers(model: Flux) -> FluxTransformer2DModel:
    params = model.params
    other = FluxTransformer2DModel(
        in_channels=params.in_channels,
        num_layers=params.depth,
        num_single_layers=params.depth_single_blocks,
        attention_head_dim=params.hidden_size // params.num_heads,
        num_attention_heads=params.num_heads,
        joint_attention_dim=params.context_in_dim,
        pooled_projection_dim=params.vec_in_dim,
        guidance_embeds=params.guidance_embed,
        axes_dims_rope=params.axes_dim,
    )
    other.load_state_dict(flux_to_diffusers(model.state_dict(), params), strict=True)
    return other.eval()


@torch.no_grad()
def diffusers_forward(model: FluxTransformer2DModel, inputs: dict, guidance: bool) -> torch.Tensor:
    return model(
        hidden_states=inputs["img"],
        encoder_hidden_states=inputs["txt"],
        pooled_projections=inputs["y"],
        timestep=inputs["timesteps"],
        img_ids=inputs["img_ids"][0],
        txt_ids=inputs["txt_ids"][0],
        guidance=inputs["guidance"] if guidance else None,
    ).sample


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"guidance": False},
        {"head": 32, "heads": 1, "depth": 1, "singles": 3},
        {"head": 128, "heads": 1, "depth": 1, "singles": 1, "guidance": False},
    ],
)
def test_forward_equals_diffusers(sizes):
    params = flux_params(**sizes)
    model = random_flux(params)
    inputs = flux_inputs(params)
    with torch.no_grad():
        ours = model(**inputs)
    theirs = diffusers_forward(as_diffusers(model), inputs, params.guidance_embed)
    assert theirs.abs().max() > 0.1
    assert difference(ours, theirs) < 1e-5


def test_forward_and_gradients_equal_the_recorded_ones(recorded):
    inputs, outputs = dict(recorded[0]), recorded[1]
    target, mask = inputs.pop("target"), inputs.pop("txt_attention_mask")
    model = load_flux(DATA / "flux.safetensors").requires_grad_(True)
    inputs["img"].requires_grad_(True)
    pred = model(**inputs)
    assert difference(pred, outputs["pred"]) < 1e-5
    with torch.no_grad():
        masked = model(**inputs, txt_attention_mask=mask)
    assert difference(masked, outputs["pred_masked"]) < 1e-5
    assert difference(pred.detach(), outputs["pred_masked"]) > 1e-3
    loss = (pred - target).square().mean()
    assert loss.item() == pytest.approx(outputs["loss"].item(), rel=1e-6)
    loss.backward()
    parameters = dict(model.named_parameters())
    compared = [name for name in outputs if name.startswith("grad.")]
    assert len(compared) == 5
    for name in compared:
        assert difference(parameters[name.removeprefix("grad.")].grad, outputs[name]) < 2e-5, name
    assert difference(inputs["img"].grad, outputs["grad_input.img"]) < 1e-5


def test_recomputing_some_or_all_blocks_changes_no_gradient():
    params = flux_params(depth=2, singles=2)
    inputs = flux_inputs(params)

    def gradients(**options):
        model = random_flux(params).train()
        if options:
            model.enable_gradient_checkpointing(**options)
        kept = 0

        def count(tensor):
            nonlocal kept
            kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss = model(**inputs).square().mean()
        loss.backward()
        return [p.grad for p in model.parameters()], kept

    reference, all_kept = gradients()
    half, half_kept = gradients(blocks=2)
    for options in ({"blocks": None}, {"blocks": None, "offload_inputs": True}):
        for one, other in zip(gradients(**options)[0], reference, strict=True):
            torch.testing.assert_close(one, other)
    for one, other in zip(half, reference, strict=True):
        torch.testing.assert_close(one, other)
    assert gradients(blocks=None)[1] < half_kept < all_kept


def test_bfloat16_weights_and_autocast_stay_near_float32(recorded):
    inputs, outputs = dict(recorded[0]), recorded[1]
    del inputs["target"], inputs["txt_attention_mask"]
    wide = load_flux(DATA / "flux.safetensors")
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mixed = wide(**inputs)
    narrow = load_flux(DATA / "flux.safetensors", dtype=torch.bfloat16)
    with torch.no_grad():
        pure = narrow(**inputs)
    assert mixed.dtype == pure.dtype == torch.bfloat16
    for out in (mixed, pure):
        assert 1e-6 < difference(out, outputs["pred"]) < 2e-2


def test_timesteps_are_not_rounded_to_the_weights_dtype():
    params = flux_params()
    model = random_flux(params).to(torch.bfloat16)
    inputs = flux_inputs(params, batch=1)
    with torch.no_grad():  # 0.9250 and 0.9265 are one number in bfloat16
        first = model(**{**inputs, "timesteps": torch.tensor([0.9250])})
        second = model(**{**inputs, "timesteps": torch.tensor([0.9265])})
    assert torch.tensor(0.9250).bfloat16() == torch.tensor(0.9265).bfloat16()
    assert difference(first, second) > 1e-3


def test_sinusoidal_embedding_in_closed_form():
    t = torch.tensor([0.37])
    embedded = sinusoidal_embedding(t)[0].double()
    angles = 370.0 * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    torch.testing.assert_close(embedded, torch.cat((angles.cos(), angles.sin())), atol=5e-5, rtol=0)


def test_rotation_keeps_length_and_depends_on_relative_position():
    q, k = torch.randn(2, 1, 1, 1, 16).double().float().unbind(0)

    def product(a: float, b: float) -> torch.Tensor:
        at = [rotations(torch.tensor([[[0.0, p, 2 * p]]]), (4, 6, 6), 10000.0) for p in (a, b)]
        return (rotate(q, at[0]) * rotate(k, at[1])).sum()

    torch.testing.assert_close(product(3, 5), product(10, 12), rtol=1e-4, atol=1e-5)
    assert not torch.isclose(product(3, 5), product(3, 6))
    turned = rotate(q, rotations(torch.tensor([[[1.0, 2.0, 3.0]]]), (4, 6, 6), 10000.0))
    torch.testing.assert_close(turned.norm(), q.norm())


def test_missing_guidance_is_an_error():
    params = flux_params()
    inputs = flux_inputs(params)
    del inputs["guidance"]
    with pytest.raises(ValueError, match="guidance"):
        random_flux(params)(**inputs)


@pytest.mark.parametrize(
    ("head", "axes"), [(128, (16, 56, 56)), (16, (4, 6, 6)), (32, (4, 14, 14)), (64, (8, 28, 28))]
)
def test_rotary_axes(head, axes):
    assert rotary_axes(head) == axes


def test_full_size_has_the_published_tensors():
    with torch.device("meta"):
        model = Flux(FluxParams())
    assert len(model.state_dict()) == 780
    assert sum(p.numel() for p in model.parameters()) == 11_901_408_320
    blocks = [type(m).__name__ for m in model.modules() if isinstance(m, nn.Module)]
    assert blocks.count("DoubleStreamBlock") == 19
    assert blocks.count("SingleStreamBlock") == 38
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
    assert not {"Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"} & set(blocks)
