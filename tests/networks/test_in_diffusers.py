"""A file written by our network, loaded by diffusers into its own FLUX: every key taken, the same change."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

from library.config.sections.network import NetworkConfig
from library.flow.path import image_ids
from library.models.flux import Flux
from library.models.key_maps import flux_to_diffusers
from library.models.params import FluxParams
from networks.interface import create

# diffusers' reader of Kohya files cuts linear1 at FLUX's real widths, so the width is real and the rest is small.
PARAMS = FluxParams(
    vec_in_dim=32, context_in_dim=64, hidden_size=3072, num_heads=24, mlp_hidden=12288, depth=1,
    depth_single_blocks=1,
)  # fmt: skip


@pytest.fixture(scope="module")
def ours() -> Flux:
    torch.manual_seed(0)
    model = Flux(PARAMS).requires_grad_(False).eval()
    for parameter in model.parameters():
        parameter.copy_(torch.empty_like(parameter).uniform_(-0.02, 0.02))
    return model


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {
        "img": torch.randn(1, 4, 64, generator=generator),
        "txt": torch.randn(1, 3, 64, generator=generator),
        "y": torch.randn(1, 32, generator=generator),
        "timesteps": torch.tensor([0.6]),
        "guidance": torch.tensor([3.5]),
    }


def run_ours(model: Flux) -> torch.Tensor:
    given = inputs()
    with torch.no_grad():
        out: torch.Tensor = model(
            **given, img_ids=image_ids(1, height=4, width=4), txt_ids=torch.zeros(1, 3, 3)
        )
    return out


def run_theirs(model: FluxTransformer2DModel) -> torch.Tensor:
    given = inputs()
    with torch.no_grad():
        out: torch.Tensor = model(
            hidden_states=given["img"], encoder_hidden_states=given["txt"], pooled_projections=given["y"],
            timestep=given["timesteps"], guidance=given["guidance"], img_ids=image_ids(1, height=4, width=4)[0],
            txt_ids=torch.zeros(3, 3),
        ).sample  # fmt: skip
    return out


def test_diffusers_loads_the_file_and_computes_the_same(
    tmp_path: Path, ours: Flux, caplog: pytest.LogCaptureFixture
):
    with torch.device("meta"):
        theirs = FluxTransformer2DModel(
            num_layers=1,
            num_single_layers=1,
            joint_attention_dim=64,
            pooled_projection_dim=32,
            guidance_embeds=True,
        )
    theirs.load_state_dict(flux_to_diffusers(dict(ours.state_dict()), PARAMS), assign=True)
    base = run_ours(ours)
    assert torch.allclose(run_theirs(theirs.eval()), base, rtol=0, atol=1e-5 * float(base.abs().max()))

    network = create(
        NetworkConfig(
            network_module="networks.lora_flux", network_dim=4, network_alpha=2.0, network_train_unet_only=True
        ),
        text_encoders=[], transformer=ours,
    )  # fmt: skip
    network.apply()
    with torch.no_grad():
        for parameter in network.module.parameters():
            parameter.copy_(torch.empty_like(parameter).uniform_(-0.1, 0.1))
    network.module.eval()
    network.save(tmp_path / "lora.safetensors", dtype=None, metadata={})
    changed = run_ours(ours)
    assert float((changed - base).abs().max()) > 0.05 * float(base.abs().max())

    pipeline = FluxPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, text_encoder=None, tokenizer=None,
        text_encoder_2=None, tokenizer_2=None, transformer=theirs,
    )  # fmt: skip
    pipeline.load_lora_weights(str(tmp_path / "lora.safetensors"))
    # The pipeline has no text encoder, which diffusers remarks; about the transformer it must say nothing.
    said = [r.getMessage() for r in caplog.records if "text_encoder" not in r.getMessage()]
    assert not [line for line in said if "unexpected" in line.lower() or "missing" in line.lower()]
    layers = [name for name, _ in theirs.named_modules() if name.endswith("lora_A.default_0")]
    # qkv and linear1 are several layers there: 6 + 2 of attention, 4 of the MLPs, 2 modulations; 3 + 1 + 1 + 1.
    assert len(layers) == 20
    difference = float((run_theirs(theirs) - changed).abs().max())
    assert difference < 1e-4 * float((changed - base).abs().max())
