"""CLIP-L and T5 on transformers' classes, behind attribute paths that do not change with its version.

transformers 5 dropped the `text_model` level of its CLIP; adapter files and checkpoints name it, so `ClipL`
has it under every version. Both encoders do nothing at random: dropout is off even in train mode (which
HF's activation checkpointing needs), since noisy prompts help nobody. transformers is imported when an
encoder is built, because it takes seconds. Prompt weighting is left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from library.models.params import ClipParams, T5Params


class ClipL(nn.Module):
    """The text half of CLIP; paths are `text_model.encoder.layers.0.self_attn.k_proj` and so on.

    `hidden_act` replaces the activation of `params`; CLIP-L was trained with quick_gelu.
    """

    def __init__(self, params: ClipParams, *, hidden_act: str | None = None) -> None:
        super().__init__()
        from transformers import CLIPTextConfig, CLIPTextModel  # noqa: PLC0415 (takes seconds to import)

        config = CLIPTextConfig(
            vocab_size=params.vocab_size,
            hidden_size=params.hidden_size,
            intermediate_size=params.intermediate_size,
            projection_dim=params.hidden_size,
            num_hidden_layers=params.num_layers,
            num_attention_heads=params.num_heads,
            max_position_embeddings=params.max_positions,
            hidden_act=hidden_act or params.hidden_act,
            layer_norm_eps=params.layer_norm_eps,
            attention_dropout=0.0,
            bos_token_id=0,
            eos_token_id=2,
        )
        self.params = params
        model = CLIPTextModel(config)
        self.text_model: nn.Module = getattr(model, "text_model", model)
        self._checkpointer: tuple[Any, ...] = (model,)  # a tuple hides it from the module tree
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        """Pooled vectors [B, D] of token ids [B, 77]: the normalised state at the position of the largest id.

        The end-of-text token has the largest id; padding repeats it and arg-max takes the first.
        """
        hidden = self.text_model(input_ids=ids).last_hidden_state
        rows = torch.arange(ids.shape[0], device=hidden.device)
        pooled: Tensor = hidden[rows, ids.argmax(dim=-1).to(hidden.device)]
        return pooled

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the layers' activations in the backward pass; takes effect in train mode."""
        self._checkpointer[0].gradient_checkpointing_enable({"use_reentrant": False})

    def fill_buffers(self, device: torch.device) -> None:
        """Set what no checkpoint holds, after a start on the meta device: the positions 0..76."""
        positions = torch.arange(self.params.max_positions, device=device).expand(1, -1)
        self.text_model.get_submodule("embeddings").register_buffer(
            "position_ids", positions, persistent=False
        )


class T5Encoder(nn.Module):
    """The encoder of T5 v1.1; paths are `encoder.block.0.layer.0.SelfAttention.q` and so on."""

    def __init__(self, params: T5Params) -> None:
        super().__init__()
        from transformers import T5Config, T5EncoderModel  # noqa: PLC0415 (takes seconds to import)

        config = T5Config(
            vocab_size=params.vocab_size,
            d_model=params.d_model,
            d_kv=params.d_kv,
            d_ff=params.d_ff,
            num_layers=params.num_layers,
            num_heads=params.num_heads,
            relative_attention_num_buckets=params.num_buckets,
            feed_forward_proj="gated-gelu",
            dropout_rate=0.0,
            is_encoder_decoder=False,
            use_cache=False,
        )
        self.params = params
        model = T5EncoderModel(config)
        self.shared: nn.Embedding = model.shared
        self.encoder: nn.Module = model.encoder
        self._checkpointer: tuple[Any, ...] = (model,)
        self.encoder.embed_tokens = self.shared  # one module, so a weight assigned to one is seen by both
        self.eval()

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Last hidden state [B, L, D] of token ids [B, L].

        `mask` [B, L] keeps padding (0) from being attended to; None attends to it, as FLUX.1 was trained.
        """
        hidden: Tensor = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
        return hidden

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the layers' activations in the backward pass; takes effect in train mode."""
        self._checkpointer[0].gradient_checkpointing_enable({"use_reentrant": False})
