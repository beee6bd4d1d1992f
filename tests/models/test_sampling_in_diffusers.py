"""Sample pictures against diffusers' FluxPipeline: same weights, texts and seed, same picture."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline
from model_examples import difference, flux_params, random_autoencoder, random_flux
from test_flux_forward import as_diffusers

from library.adapters.flux import FluxTrainModule, ForwardSettings
from library.adapters.preview import FluxPreviewer
from library.config.prompts import SamplePrompt
from library.data.records import TextCond
from library.flow.path import pack
from library.models.key_maps import autoencoder_to_diffusers
from library.models.params import AutoEncoderParams

AE = AutoEncoderParams(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1)  # eight pixels a latent cell, as FLUX's
PLAIN = SamplePrompt(
    index=0,
    prompt="a cat",
    negative_prompt="a dog",
    width=96,
    height=64,
    seed=42,
    sample_steps=5,
    guidance_scale=2.5,
)
TEXT_TOKENS = 7


def shift_of(is_dev: bool) -> FlowMatchEulerDiscreteScheduler:
    """The scheduler's settings that FLUX.1's repositories have."""
    if not is_dev:
        return FlowMatchEulerDiscreteScheduler(shift=1.0)
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, shift=3.0, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("is_dev", "prompt"),
    [(True, PLAIN), (True, replace(PLAIN, scale=3.0, seed=7)), (False, replace(PLAIN, width=64, height=128))],
    ids=["dev", "dev with classifier-free guidance", "schnell"],
)
def test_latents_and_picture_equal_those_of_the_pipeline(is_dev: bool, prompt: SamplePrompt):
    params = flux_params(guidance=is_dev)
    flux, autoencoder = random_flux(params), random_autoencoder(AE)
    source = torch.Generator().manual_seed(1)
    texts = {
        text: TextCond(
            clip_pooled=torch.randn(1, params.vec_in_dim, generator=source),
            t5_hidden=torch.randn(1, TEXT_TOKENS, params.context_in_dim, generator=source),
            t5_mask=torch.ones(1, TEXT_TOKENS, dtype=torch.int64),
        )
        for text in (prompt.prompt, prompt.negative_prompt)
    }
    ours = FluxPreviewer(
        module=FluxTrainModule(
            transformer=flux, network=None, clip_l=None, t5=None,
            settings=ForwardSettings(guidance_scale=1.0, apply_t5_attn_mask=False, autocast_dtype=None),
        ),
        autoencoder=autoencoder, conditions=texts.__getitem__, set_strength=lambda strength: None,
        device=torch.device("cpu"), shifted=is_dev, seed=0,
    )  # fmt: skip
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=[AE.ch * m for m in AE.ch_mult], layers_per_block=AE.num_res_blocks, latent_channels=16,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.3611, shift_factor=0.1159,
    )  # fmt: skip
    vae.load_state_dict(autoencoder_to_diffusers(autoencoder.state_dict(), AE), strict=True)
    pipeline = FluxPipeline(
        scheduler=shift_of(is_dev), vae=vae.eval(), text_encoder=None, tokenizer=None, text_encoder_2=None,
        tokenizer_2=None, transformer=as_diffusers(flux),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)

    def theirs(output_type: str) -> torch.Tensor:
        wanted, unwanted = texts[prompt.prompt], texts[prompt.negative_prompt]
        return pipeline(
            prompt_embeds=wanted.t5_hidden, pooled_prompt_embeds=wanted.clip_pooled,
            negative_prompt_embeds=unwanted.t5_hidden, negative_pooled_prompt_embeds=unwanted.clip_pooled,
            true_cfg_scale=prompt.scale, guidance_scale=prompt.guidance_scale, width=prompt.width,
            height=prompt.height, num_inference_steps=prompt.sample_steps,
            generator=torch.Generator("cpu").manual_seed(prompt.seed or 0), output_type=output_type,
        ).images  # fmt: skip

    latents, expected = ours.latents(prompt), theirs("latent")
    assert expected.std() > 0.1
    assert float((pack(latents) - expected).abs().max()) < 1e-3
    assert difference(pack(latents), expected) < 1e-4
    picture, pixels = ours.picture(latents), theirs("pt")[0].permute(1, 2, 0).numpy()
    assert picture.size == (prompt.width, prompt.height)
    assert pixels.std() > 0.02
    # Ours are cut to whole bytes.
    assert np.abs(np.asarray(picture) / 255 - pixels).max() < 1 / 255 + 1e-3
