"""The sampling schedule, the Euler loop, noise and pictures."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from einops import rearrange

from library.adapters.sampling import (
    initial_noise,
    sample_latents,
    schedule,
    schedule_for,
    seed_of,
    to_image,
)
from library.config.prompts import SamplePrompt
from library.data.records import TextCond

VECTORS = json.loads((Path(__file__).parent / "data/flow/vectors.json").read_text())["sampling_schedule"]


def _text(value: float) -> TextCond:
    return TextCond(
        clip_pooled=torch.full((1, 8), value),
        t5_hidden=torch.full((1, 4, 8), value),
        t5_mask=torch.ones(1, 4, dtype=torch.int64),
    )


@pytest.mark.parametrize("name", VECTORS)
def test_schedule_equals_the_reference(name):
    steps, tokens = (int("".join(filter(str.isdigit, part))) for part in name.split("_"))
    assert schedule(steps, tokens=tokens) == pytest.approx(VECTORS[name], abs=2e-7)


def test_schedule_without_shift_is_even_and_size_sets_the_shift():
    assert schedule(4, tokens=4096, shift=False) == (1.0, 0.75, 0.5, 0.25, 0.0)
    prompt = SamplePrompt(index=0, prompt="a", width=512, height=512, sample_steps=4)
    assert schedule_for(prompt) == pytest.approx(VECTORS["steps4_tokens1024"], abs=2e-7)


def test_a_straight_flow_is_followed_exactly():
    noise, picture = torch.randn(1, 16, 4, 6), torch.randn(1, 16, 4, 6)
    calls = []

    def straight(latents, t, guidance, text):
        calls.append((t.item(), guidance.item(), text.clip_pooled[0, 0].item()))
        return (latents - picture) / t.reshape(-1, 1, 1, 1)

    times = schedule(5, tokens=6)
    got = sample_latents(
        straight, noise=noise, times=times, text=_text(1.0), negative=_text(0.0), scale=1.0, guidance=3.5
    )
    torch.testing.assert_close(got, picture, atol=1e-5, rtol=0)
    assert [call[0] for call in calls] == pytest.approx(times[:-1])
    assert {call[1:] for call in calls} == {(3.5, 1.0)}


@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_classifier_free_guidance_runs_both_texts_in_one_batch(scale):
    noise = torch.randn(1, 16, 4, 4)

    def constant(latents, t, guidance, text):
        assert latents.shape == (2, 16, 4, 4)
        assert t.shape == guidance.shape == (2,)
        assert text.t5_mask.shape == (2, 4)
        return text.clip_pooled[:, :1, None, None].expand_as(latents)

    got = sample_latents(
        constant,
        noise=noise,
        times=(1.0, 0.5, 0.0),
        text=_text(3.0),
        negative=_text(1.0),
        scale=scale,
        guidance=1.0,
    )
    torch.testing.assert_close(got, noise - (1.0 + scale * 2.0))


def test_no_guidance_without_a_negative_text():
    def check(latents, t, guidance, text):
        assert latents.shape[0] == 1
        return torch.zeros_like(latents)

    noise = torch.randn(1, 16, 4, 4)
    times = schedule(2, tokens=4)
    got = sample_latents(check, noise=noise, times=times, text=_text(1), negative=None, scale=4, guidance=1)
    assert torch.equal(got, noise)


def test_noise_is_that_of_comfyui_and_of_diffusers_on_the_cpu():
    prompt = SamplePrompt(index=0, prompt="a", width=96, height=64, seed=42)
    noise = initial_noise(prompt, run_seed=0)
    assert noise.shape == (1, 16, 8, 12)
    assert torch.equal(noise, torch.randn(1, 16, 8, 12, generator=torch.Generator().manual_seed(42)))
    assert torch.equal(noise, initial_noise(prompt, run_seed=1))


def test_a_prompt_without_seed_keeps_its_noise_within_a_run():
    first, second = (SamplePrompt(index=index, prompt="a", width=64, height=64) for index in (0, 1))
    assert torch.equal(initial_noise(first, run_seed=7), initial_noise(first, run_seed=7))
    assert not torch.equal(initial_noise(first, run_seed=7), initial_noise(second, run_seed=7))
    assert not torch.equal(initial_noise(first, run_seed=7), initial_noise(first, run_seed=8))
    assert 0 <= seed_of(first, run_seed=7) < 2**32


def test_pictures_are_clipped_and_cut_to_bytes():
    values = torch.tensor([-2.0, -1.0, 0.0, 0.5, 1.0, 2.0])
    decoded = values.reshape(1, 1, 2, 3).expand(1, 3, 2, 3).clone()
    decoded[0, 1] = -1
    picture = to_image(decoded)
    assert (picture.size, picture.mode) == ((3, 2), "RGB")
    assert np.asarray(picture)[..., 0].flatten().tolist() == [0, 0, 127, 191, 255, 255]
    assert np.asarray(picture)[..., 1].max() == 0
    assert to_image(rearrange(decoded, "1 c h w -> c h w").bfloat16()).tobytes() == picture.tobytes()
