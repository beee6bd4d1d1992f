"""networks.oft_flux against a recorded layer of the reference, its keys, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from library.config.sections.network import NetworkConfig
from library.errors import NetworkPluginError
from networks.interface import create
from networks.oft_flux import OFTLinear
from networks.targets import DOUBLE, UNET, Candidate
from tests.networks.tiny_models import Rig

# sd-scripts 48d368fa: a fused projection of 8 inputs, two blocks a part, constraint 0.02, strength 0.7.
RECORDED = load_file(Path(__file__).resolve().parent.parent / "data" / "networks" / "oft_layer.safetensors")


def recorded_layer() -> tuple[nn.Linear, OFTLinear]:
    linear = nn.Linear(8, 24)
    linear.load_state_dict({name: RECORDED[name] for name in ("weight", "bias")})
    linear.requires_grad_(False)
    candidate = Candidate(prefix=UNET, path="double_blocks.0.img_attn.qkv", linear=linear, block=DOUBLE)
    oft = OFTLinear(candidate, blocks=2, constraint=0.02, multiplier=0.7)
    with torch.no_grad():
        for number, blocks in enumerate(oft.oft_blocks):
            blocks.copy_(RECORDED[f"oft_blocks.{number}"])
    return linear, oft


def test_a_recorded_layer_and_its_gradients_come_out():
    linear, oft = recorded_layer()
    oft.apply_to()
    output = linear(RECORDED["x"])
    torch.testing.assert_close(output, RECORDED["y"])
    output.square().sum().backward()
    for number, blocks in enumerate(oft.oft_blocks):
        torch.testing.assert_close(blocks.grad, RECORDED[f"gradient.{number}"])


def test_merged_it_is_the_same_layer():
    linear, oft = recorded_layer()
    oft.merge()
    torch.testing.assert_close(linear(RECORDED["x"]), RECORDED["y"])


def test_a_large_rotation_is_held_to_the_constraint_and_stays_orthogonal():
    _, oft = recorded_layer()
    oft.multiplier = 1.0
    with torch.no_grad():
        for blocks in oft.oft_blocks:
            blocks.mul_(1e3)
    for turn in oft.turns():
        rotation = turn + torch.eye(4)
        torch.testing.assert_close(rotation @ rotation.transpose(1, 2), torch.eye(4).expand(2, 4, 4))
        assert float(turn.detach().norm()) < 0.5, "the constraint is 0.02 times 8 rows, for Q"


def test_keys_are_kohyas(tmp_path: Path):
    rig = Rig()
    config = NetworkConfig(network_module="networks.oft_flux", network_dim=4, network_alpha=1e-3)
    handle = create(config, text_encoders=rig.text_encoders, transformer=rig.flux)
    handle.apply()
    handle.save(tmp_path / "oft.safetensors", dtype=None, metadata=None)
    layers = [f"oft_unet_double_blocks_{i}_{side}_attn" for i in (0, 1) for side in ("img", "txt")]
    assert set(load_file(tmp_path / "oft.safetensors")) == {
        *(f"{layer}_qkv.oft_blocks.{part}" for layer in layers for part in range(3)),
        *(f"{layer}_proj.oft_blocks.0" for layer in layers),
        *(f"{layer}_{name}.alpha" for layer in layers for name in ("qkv", "proj")),
    }


@pytest.mark.parametrize(
    ("dim", "arguments", "said"),
    [
        (5, (), "must divide the 16 rows of double_blocks.0.img_attn.qkv"),
        (4, ("enable_conv=True",), "knows enable_all_linear only"),
        (4, ("enable_all_linear=perhaps",), "must be True or False"),
    ],
)
def test_what_cannot_be_is_said(dim: int, arguments: tuple[str, ...], said: str):
    rig = Rig()
    config = NetworkConfig(network_module="networks.oft_flux", network_dim=dim, network_args=arguments)
    with pytest.raises(NetworkPluginError, match=said):
        create(config, text_encoders=[], transformer=rig.flux)
