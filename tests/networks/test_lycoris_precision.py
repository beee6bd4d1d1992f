"""LyCORIS on base weights of 16 and 8 bits: what it adds is what its factors say."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import Tensor, nn

from library.config.sections.network import NetworkConfig
from library.errors import NetworkPluginError
from library.models.precision import store_blocks_in_fp8
from networks.interface import NetworkHandle, create
from tests.networks.tiny_models import WIDTH, Rig


def made(rig: Rig, *arguments: str) -> NetworkHandle:
    """A network whose products are about 1e-4 beside weights of 0.1, as after some steps."""
    settings = NetworkConfig(
        network_module="lycoris.kohya",
        network_dim=4,
        network_alpha=4.0,
        network_train_unet_only=True,
        network_args=("factor=4", *arguments),
    )
    handle = create(settings, text_encoders=[], transformer=rig.flux)
    handle.apply()
    generator = torch.Generator().manual_seed(7)
    size = 0.1 if "algo=loha" in arguments else 0.01
    for parameter in handle.module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * size
    return handle


def added(linear: nn.Linear) -> Tensor:
    """What the network on `linear` adds to its output for the unit vectors."""
    own = vars(linear)["forward"].__self__
    own.org_forward = lambda x: torch.zeros(*x.shape[:-1], linear.out_features, dtype=x.dtype)
    with torch.no_grad():
        return linear(torch.eye(WIDTH)).float()


@pytest.mark.parametrize("eight_bits", [False, True])
@pytest.mark.parametrize("algorithm", ["locon", "loha", "lokr", "glora"])
def test_changes_are_not_rounded_to_the_base_weights_dtype(algorithm: str, eight_bits: bool) -> None:
    exact, rig = Rig(), Rig(dtype=torch.bfloat16)
    if eight_bits:
        store_blocks_in_fp8(rig.flux)
    made(exact, f"algo={algorithm}").module.eval()
    handle = made(rig, f"algo={algorithm}")
    layer = rig.flux.double_blocks[0].img_attn.proj

    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(2, 3, WIDTH)).sum().backward()
    trained = vars(layer)["forward"].__self__
    assert all(parameter.grad is not None for parameter in trained.parameters())

    handle.module.eval()
    expected = added(exact.flux.double_blocks[0].img_attn.proj)
    assert 0 < expected.abs().mean() < 1e-3
    torch.testing.assert_close(added(layer), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("arguments", [("algo=lokr", "dora_wd=True"), ("algo=diag-oft",)])
def test_what_rebuilds_weights_is_refused_on_8_bits_and_warned_of_on_16(
    arguments: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    rig = Rig(dtype=torch.bfloat16)
    with caplog.at_level(logging.WARNING):
        made(rig, *arguments)
    assert "small changes are rounded away" in caplog.text

    stored = Rig(dtype=torch.bfloat16)
    store_blocks_in_fp8(stored.flux)
    with pytest.raises(NetworkPluginError, match="drop fp8_base"):
        made(stored, *arguments)


def test_a_decomposition_that_would_have_no_effect_is_refused() -> None:
    with pytest.raises(NetworkPluginError, match="bypass_mode=True leaves dora_wd without effect"):
        made(Rig(), "algo=lokr", "dora_wd=True", "bypass_mode=True")


def test_the_users_choice_of_bypass_mode_stands() -> None:
    handle = made(Rig(), "algo=lokr", "bypass_mode=False")
    assert not any(module.bypass_mode for module in handle.module.unet_loras)


def test_a_preset_may_stand_in_network_args() -> None:
    rig = Rig()
    preset = {
        "unet_target_module": [],
        "unet_target_name": ["double_blocks.*.img_attn.*", "single_blocks.*.linear1"],
        "use_fnmatch": True,
        "name_algo_map": {"double_blocks.*.img_attn.*": {"factor": 2}},
    }
    handle = made(rig, "algo=lokr", f"preset={json.dumps(preset)}")
    names = {name.split(".")[0] for name, _ in handle.module.named_parameters()}
    assert "lora_unet_single_blocks_0_linear1" in names
    assert all("img_attn" in name or name.endswith("linear1") for name in names)

    with pytest.raises(NetworkPluginError, match="no JSON object"):
        made(Rig(), "algo=lokr", "preset={broken")
