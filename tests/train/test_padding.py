"""Text without its padding: the answer of the masked model, from fewer tokens."""

from __future__ import annotations

import torch

from library.adapters.base import Conditions
from library.adapters.flux import FluxAdapter, FluxTrainModule, ForwardSettings, without_padding
from library.data.records import Batch, TextCond
from library.models.flux import Flux
from library.models.params import FluxParams
from library.randomness import Visit

PARAMS = FluxParams(
    vec_in_dim=8, context_in_dim=12, hidden_size=32, num_heads=2, mlp_hidden=64, depth=1,
    depth_single_blocks=1, axes_dim=(4, 6, 6),
)  # fmt: skip


def text(*lengths: int, total: int = 200) -> TextCond:
    """Outputs of texts of these lengths; what lies in the padding is as large as the rest."""
    torch.manual_seed(0)
    mask = (torch.arange(total) < torch.tensor(lengths)[:, None]).long()
    return TextCond(torch.randn(len(lengths), 8), torch.randn(len(lengths), total, 12), mask)


def test_lengths_are_few():
    assert without_padding(text(3, 60)).t5_hidden.shape == (2, 64, 12)
    assert without_padding(text(3, 65)).t5_mask.shape == (2, 128)
    assert without_padding(text(195)).t5_hidden.shape == (1, 200, 12)
    assert without_padding(text(0)).t5_hidden.shape == (1, 64, 12)


def test_what_the_model_answers_stays():
    torch.manual_seed(1)
    model = Flux(PARAMS)
    module = FluxTrainModule(
        transformer=model, network=None, clip_l=None, t5=None,
        settings=ForwardSettings(guidance_scale=1.0, apply_t5_attn_mask=True, autocast_dtype=None),
    )  # fmt: skip
    x_t, t = torch.randn(2, 16, 8, 6), torch.tensor([0.3, 0.8])
    for lengths in ((5, 70), (128, 128)):
        full = text(*lengths)
        expected = module(x_t, t, Conditions(text=full, tokens=None))
        batch = Batch(
            visits=(Visit("0/a/1", 0), Visit("0/a/2", 0)), captions=("", ""), latents=x_t, images=None, text=full,
            loss_weights=torch.ones(2), shares=torch.full((2,), 0.5), mask=None,
        )  # fmt: skip
        adapter = FluxAdapter(
            device=torch.device("cpu"), tokenizers=None, encode_images=None, seed=0, drop_padding=True
        )
        cond = adapter.inputs(batch).cond
        assert cond.text is not None
        assert cond.text.t5_hidden.shape[1] == 128
        assert cond.has_padding == (lengths == (5, 70)), "no padding, no mask"
        torch.testing.assert_close(module(x_t, t, cond), expected, rtol=1e-4, atol=1e-5)
