"""Frozen weights in 8 bits: what is stored, what is computed, what is kept for the backward pass."""

from __future__ import annotations

import pytest
import torch
from model_examples import difference, flux_inputs, flux_params, random_flux
from torch import nn

from library.files.safetensors import save_file
from library.models.load import load_flux, load_t5
from library.models.params import T5Params
from library.models.precision import cast, is_block_weight, store_blocks_in_fp8
from library.models.text_encoders import T5Encoder

FP8 = torch.float8_e4m3fn
PARAMS = flux_params(depth=1, singles=2)


def rounded(model):
    """The same model with block weights rounded to 8 bits, but stored and multiplied in float32."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            in_block = name.startswith(("double_blocks", "single_blocks", "encoder.block"))
            if parameter.ndim == 2 and in_block and "relative_attention_bias" not in name:
                parameter.copy_(parameter.to(FP8).float())
    return model


def test_only_the_linears_of_blocks_are_stored_in_8_bits(tmp_path):
    path = tmp_path / "flux.safetensors"
    save_file(path, random_flux(PARAMS).state_dict())
    model = load_flux(path, dtype=torch.bfloat16, weight_dtype=FP8)
    for name, parameter in model.named_parameters():
        in_block = name.startswith(("double_blocks", "single_blocks")) and parameter.ndim == 2
        assert parameter.dtype == (FP8 if in_block else torch.bfloat16), name
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


def test_forward_and_input_gradient_are_those_of_the_rounded_weights():
    inputs = flux_inputs(PARAMS)
    inputs["img"].requires_grad_(True)
    reference = rounded(random_flux(PARAMS))
    expected = reference(**inputs)
    expected.square().sum().backward()
    expected_grad, inputs["img"].grad = inputs["img"].grad, None
    stored = random_flux(PARAMS)
    assert store_blocks_in_fp8(stored) == 10 + 2 * 3
    out = stored(**inputs)
    out.square().sum().backward()
    assert difference(out, expected) < 1e-6
    assert difference(inputs["img"].grad, expected_grad) < 1e-5


def test_biases_in_8_bit_layers_can_be_trained():
    layer = nn.Module()
    layer.single_blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 3))])
    store_blocks_in_fp8(layer)
    linear = layer.single_blocks[0][0]
    x = torch.randn(5, 2, 4)
    linear(x).sum().backward()
    torch.testing.assert_close(linear.bias.grad, torch.full((3,), 10.0))


def test_backward_keeps_the_8_bit_weight_and_not_a_wider_copy():
    model = random_flux(PARAMS)
    widths = []

    def note(tensor):
        if tensor.ndim == 2 and tensor.shape == (96, 32):
            widths.append(tensor.dtype)
        return tensor

    store_blocks_in_fp8(model)
    inputs = flux_inputs(PARAMS)
    inputs["img"].requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        model(**inputs)
    assert widths == [FP8] * 4  # qkv of both streams, modulation of both single blocks


def test_autocast_multiplies_in_its_dtype():
    model = random_flux(PARAMS)
    store_blocks_in_fp8(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = model(**flux_inputs(PARAMS))
        inner = model.single_blocks[0].linear2(torch.randn(1, 2, 160))
    assert out.dtype == inner.dtype == torch.bfloat16


def test_large_weights_saturate():
    wide = torch.tensor([1000.0, -1e9, 448.0, 3.0])
    assert cast(wide, FP8).float().tolist() == [448.0, -448.0, 448.0, 3.0]
    assert cast(wide, None) is wide


def test_a_file_of_8_bits_throughout(tmp_path):
    """As some published files are: biases and embedders in 8 bits as well."""
    path = tmp_path / "flux.safetensors"
    weights = random_flux(PARAMS).state_dict()
    save_file(path, {k: v.to(FP8) for k, v in weights.items()})
    model = load_flux(path)
    assert model.img_in.weight.dtype == torch.bfloat16
    assert model.double_blocks[0].img_attn.qkv.weight.dtype == FP8
    reference = load_flux(path, dtype=torch.float32)
    inputs = flux_inputs(PARAMS)
    with torch.no_grad():
        assert difference(model(**inputs), reference(**inputs)) < 3e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_t5_in_8_bits(tmp_path, dtype):
    params = T5Params(vocab_size=40, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)
    t5 = T5Encoder(params)
    save_file(
        tmp_path / "t5.safetensors", {k: v for k, v in t5.state_dict().items() if "embed_tokens" not in k}
    )
    ids = torch.randint(0, 40, (2, 7))
    stored = load_t5(tmp_path / "t5.safetensors", dtype=dtype, weight_dtype=FP8)
    assert stored.encoder.block[0].layer[1].DenseReluDense.wo.weight.dtype == FP8
    with torch.no_grad():
        assert difference(stored(ids), rounded(t5)(ids)) < (1e-5 if dtype == torch.float32 else 3e-2)


def test_names_of_block_weights():
    assert is_block_weight("double_blocks.3.img_mod.lin.weight")
    assert is_block_weight("encoder.block.0.layer.1.DenseReluDense.wo.weight")
    for name in (
        "img_in.weight",
        "final_layer.linear.weight",
        "double_blocks.3.img_mlp.0.bias",
        "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        "encoder.block.0.layer.0.layer_norm.weight",
        "text_model.encoder.layers.0.mlp.fc1.weight",
    ):
        assert not is_block_weight(name)
