"""CLIP and T5 against transformers' own classes, and the names that adapter files depend on."""

from __future__ import annotations

import pytest
import torch
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from library.models.params import ClipParams, T5Params
from library.models.text_encoders import ClipL, T5Encoder

CLIP = ClipParams(vocab_size=60, hidden_size=64, intermediate_size=96, num_layers=2, num_heads=2)
T5 = T5Params(vocab_size=40, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)


def clip_reference(activation: str) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        hidden_act=activation,
        eos_token_id=2,
        bos_token_id=0,
    )
    return CLIPTextModel(config).eval()


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@torch.no_grad()
def test_pooled_vector_equals_transformers(activation):
    theirs = clip_reference(activation)
    for parameter in theirs.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.1)
    ours = ClipL(CLIP, hidden_act=None if activation == "quick_gelu" else activation)
    state = theirs.state_dict()
    ours.load_state_dict(
        {k if k.startswith("text_model.") else f"text_model.{k}": v for k, v in state.items()}
    )
    ids = torch.randint(0, 58, (3, 77))
    for row, end in enumerate((5, 40, 76)):
        ids[row, end:] = 59
    torch.testing.assert_close(ours(ids), theirs(ids).pooler_output)
    other = ClipL(CLIP, hidden_act="gelu" if activation == "quick_gelu" else None)
    other.load_state_dict(ours.state_dict())
    assert (other(ids) - ours(ids)).abs().max() > 1e-4


@torch.no_grad()
def test_t5_equals_transformers_with_and_without_mask():
    config = T5Config(
        vocab_size=40,
        d_model=24,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        is_encoder_decoder=False,
    )
    theirs = T5EncoderModel(config).eval()
    ours = T5Encoder(T5)
    ours.load_state_dict(theirs.state_dict())
    ids = torch.randint(3, 40, (2, 12))
    mask = (torch.arange(12) < torch.tensor([[5], [12]])).long()
    plain, masked = ours(ids), ours(ids, mask)
    torch.testing.assert_close(plain, theirs(ids).last_hidden_state)
    torch.testing.assert_close(masked, theirs(ids, attention_mask=mask).last_hidden_state)
    assert (plain[0] - masked[0]).abs().max() > 1e-3


def test_paths_are_those_of_adapter_files():
    clip = dict(ClipL(CLIP).named_modules())
    assert type(clip["text_model.encoder.layers.0.self_attn.k_proj"]) is torch.nn.Linear
    assert type(clip["text_model.encoder.layers.1.mlp.fc2"]) is torch.nn.Linear
    assert all(name.startswith("text_model") for name in clip if name)
    t5 = dict(T5Encoder(T5).named_modules())
    assert type(t5["encoder.block.0.layer.0.SelfAttention.q"]) is torch.nn.Linear
    assert type(t5["encoder.block.1.layer.1.DenseReluDense.wi_0"]) is torch.nn.Linear
    assert all(name.startswith(("encoder", "shared")) for name in t5 if name)


def test_full_size_has_the_published_tensors():
    with torch.device("meta"):
        clip, t5 = ClipL(ClipParams()), T5Encoder(T5Params())
    assert len(clip.state_dict()) == 196
    assert len(dict(t5.named_parameters())) == 219
    assert t5.encoder.embed_tokens is t5.shared


def test_train_mode_is_not_random():
    t5, clip = T5Encoder(T5), ClipL(CLIP)
    assert not t5.training
    assert not clip.training
    ids = torch.randint(3, 40, (1, 8))
    torch.testing.assert_close(t5.train()(ids), t5.eval()(ids))


@pytest.mark.parametrize("encoder", [ClipL(CLIP), T5Encoder(T5)], ids=["clip", "t5"])
def test_gradient_checkpointing_keeps_gradients(encoder):
    ids = torch.randint(3, 40, (2, 9))

    def gradient():
        encoder.zero_grad()
        encoder.train()(ids).square().sum().backward()
        return [p.grad.clone() for p in encoder.parameters() if p.grad is not None]

    plain = gradient()
    encoder.enable_gradient_checkpointing()
    flags = [m for m in encoder.modules() if getattr(m, "gradient_checkpointing", False)]
    assert flags
    assert plain
    for one, other in zip(gradient(), plain, strict=True):
        torch.testing.assert_close(one, other)
