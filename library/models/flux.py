"""The FLUX.1 transformer: velocity of the latents at a time, given text.

Embed, double blocks, single blocks, last layer, as Black Forest Labs published it; the layers are in
`library.models.layers`. It knows nothing of noise schedules or losses (`library.flow`), nor of files
(`library.models.load`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from library.models import heads, norms
from library.models.activation_checkpoint import Recomputation, SavedOnHost
from library.models.block_swap import BlockSwap, SwapPlan
from library.models.compilation import CompiledBlocks
from library.models.layers import (
    EMBEDDING_WIDTH,
    DoubleStreamBlock,
    LastLayer,
    MLPEmbedder,
    SingleStreamBlock,
    sinusoidal_embedding,
)
from library.models.params import FluxParams
from library.models.rope import rotations


class Flux(nn.Module):
    """FLUX.1, dev (with guidance embedding) or schnell (without), of any size.

    B batch, N image tokens (2x2 patches of the latents), T text tokens.
    """

    def __init__(self, params: FluxParams) -> None:
        super().__init__()
        self.params = params
        self.recomputation: Recomputation | None = None
        self.swap: BlockSwap | None = None
        self.before_forward: Callable[[], None] | None = None  # what an adapter's products need done first
        self.compiled: CompiledBlocks | None = None
        hidden, num_heads, mlp = params.hidden_size, params.num_heads, params.mlp_hidden
        self.img_in = nn.Linear(params.in_channels, hidden)
        self.time_in = MLPEmbedder(EMBEDDING_WIDTH, hidden)
        self.vector_in = MLPEmbedder(params.vec_in_dim, hidden)
        self.guidance_in = MLPEmbedder(EMBEDDING_WIDTH, hidden) if params.guidance_embed else nn.Identity()
        self.txt_in = nn.Linear(params.context_in_dim, hidden)
        self.double_blocks = nn.ModuleList(
            DoubleStreamBlock(hidden, num_heads, mlp, params.qkv_bias) for _ in range(params.depth)
        )
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(hidden, num_heads, mlp) for _ in range(params.depth_single_blocks)
        )
        self.final_layer = LastLayer(hidden, params.out_channels)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """All blocks in forward order: double, then single ones."""
        return (*self.double_blocks, *self.single_blocks)

    def enable_gradient_checkpointing(
        self,
        *,
        blocks: int | None = None,
        offload_inputs: bool = False,
        cheap_only: bool = False,
        chance: bool = True,
    ) -> None:
        """Recompute activations of the first `blocks` blocks (all if None) in the backward pass.

        Takes effect in train mode while gradients are recorded. `offload_inputs` keeps the blocks' inputs
        in host memory meanwhile; with `cheap_only` compiled blocks keep what is small and dear. `chance` is false if
        nothing in the blocks, adapters included, draws random numbers.
        """
        inputs = SavedOnHost() if offload_inputs else None
        self.recomputation = Recomputation(blocks, inputs, cheap_only, chance)

    def recompute_first(self, blocks: int | None) -> None:
        """Recompute so many blocks, all if None, from here on; gradient checkpointing is enabled."""
        assert self.recomputation is not None, "enable_gradient_checkpointing() comes first"
        self.recomputation = replace(self.recomputation, blocks=blocks)

    def disable_gradient_checkpointing(self) -> None:
        """Keep every activation again."""
        self.recomputation = None

    def enable_block_swap(self, blocks_to_swap: int) -> BlockSwap:
        """Let Linear weights of blocks wait in main memory until their turn.

        Call it when the base weights are final (merged, in 8 bits) and before the model is compiled or
        wrapped. Weights may lie on either side already. Raises ConfigError for too many blocks, or a network
        that trains their weights.
        """
        plan = SwapPlan.of(self.params, blocks_to_swap)
        self.swap = BlockSwap(self.blocks, plan, self.img_in.weight.device)
        return self.swap

    def disable_block_swap(self) -> None:
        """Keep every weight on the device again."""
        if self.swap is not None:
            self.swap.restore()
        self.swap = None

    def enable_compilation(self, *, backend: str = "inductor", shapes: int = 1) -> CompiledBlocks:
        """Compile the blocks when they are first run in train mode, for `shapes` sizes of token streams.

        Call it when the model is final: adapters applied, weights where they belong.
        """
        for block in self.blocks:
            assert isinstance(block, (DoubleStreamBlock, SingleStreamBlock))
            block.one_pass = heads.fits(block.qk_norms) and norms.fits(block.stream_norms)
        self.compiled = CompiledBlocks(self.blocks, backend=backend, shapes=shapes)
        return self.compiled

    def compute_dtype(self) -> torch.dtype:
        """The dtype of the token streams: autocast's if it is on, else that of the embedding weights."""
        device = self.img_in.weight.device.type
        return (
            torch.get_autocast_dtype(device)
            if torch.is_autocast_enabled(device)
            else self.img_in.weight.dtype
        )

    def forward(  # noqa: PLR0913 (the published signature)
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        timesteps: Tensor,
        y: Tensor,
        guidance: Tensor | None = None,
        txt_attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Predict the velocity, noise minus image, of every patch.

        Args:
            img: [B, N, in_channels] noisy patches.
            img_ids: [B, N, 3] positions: 0, row, column.
            txt: [B, T, context_in_dim] T5 tokens.
            txt_ids: [B, T, 3] zeros.
            timesteps: [B] in (0, 1), float32; 1 is pure noise.
            y: [B, vec_in_dim] pooled CLIP vectors.
            guidance: [B], or None for a model without guidance embedding.
            txt_attention_mask: [B, T], nonzero where a text token may be attended to; None for all.

        Returns:
            [B, N, out_channels] in the compute dtype.

        Raises:
            ValueError: `guidance` is missing on a model that embeds it.
        """
        if self.before_forward is not None:
            self.before_forward()
        dtype = self.compute_dtype()
        vec = self._condition(timesteps, y.to(dtype), guidance)
        image, text = self.img_in(img.to(dtype)), self.txt_in(txt.to(dtype))
        rotation = rotations(torch.cat((txt_ids, img_ids), dim=1), self.params.axes_dim, self.params.theta)
        mask = None if txt_attention_mask is None else _key_mask(txt_attention_mask, img.shape[1])
        if self.compiled is not None:
            image, text = self._alike(image), self._alike(text)
            self.compiled.streams(*rotation, axis=2)
        for index, block in enumerate(self.double_blocks):
            if self.compiled is not None:
                self.compiled.streams(image, text, axis=1)
            image, text = self._run(index, block, image, text, vec, rotation, mask)
        stream = torch.cat((text, image), dim=1)
        for index, block in enumerate(self.single_blocks, start=len(self.double_blocks)):
            if self.compiled is not None:
                self.compiled.streams(stream, axis=1)
            stream = self._run(index, block, stream, vec, rotation, mask)
        out: Tensor = self.final_layer(stream[:, txt.shape[1] :], vec)
        return out

    def _condition(self, timesteps: Tensor, y: Tensor, guidance: Tensor | None) -> Tensor:
        """The vector [B, D] that steers every block; sinusoids are rounded only after they are made."""
        vec = self._embed(self.time_in, sinusoidal_embedding(timesteps).to(y.dtype))
        if self.params.guidance_embed:
            if guidance is None:
                raise ValueError(
                    "this model embeds guidance, so its forward pass needs a guidance value per sample"
                )
            vec = vec + self._embed(self.guidance_in, sinusoidal_embedding(guidance).to(y.dtype))
        return vec + self._embed(self.vector_in, y)

    def _embed(self, embedder: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        recomputation = self._recomputation(None)
        return embedder(x) if recomputation is None else recomputation.run(embedder, x)

    def _alike(self, stream: Tensor) -> Tensor:
        """The first block's input like every other block's, which depends on something trained.

        Else the first block would be compiled for itself.
        """
        if self.training and torch.is_grad_enabled() and not stream.requires_grad:
            stream.requires_grad_(True)
        return stream

    def _run(self, index: int, block: nn.Module, *arguments: object) -> Any:
        """Run block `index` as the options say: compiled, recomputed, with weights that travel."""
        recomputation = self._recomputation(index)
        call: Callable[..., Any] = block
        within = False  # whether the compiled block sees to its recomputation itself
        if self.compiled is not None:
            within = recomputation is not None and recomputation.cheap_only and self.compiled.active(block)
            call = self.compiled.call(block, recomputes=within)
        if self.swap is not None:
            call = self.swap.with_weights(index, call, saves=recomputation is None or within)
        if recomputation is None:
            return call(*arguments)
        return recomputation.run_compiled(call, *arguments) if within else recomputation.run(call, *arguments)

    def _recomputation(self, index: int | None) -> Recomputation | None:
        """How block `index`, None for an embedder, is recomputed in the backward pass; None if it is not."""
        active = self.recomputation if self.training and torch.is_grad_enabled() else None
        return active if active is not None and active.covers(index) else None


def _key_mask(txt_attention_mask: Tensor, image_tokens: int) -> Tensor:
    """Boolean mask [B, 1, 1, T + N] over keys: the text's own, and every image token."""
    image = torch.ones(
        txt_attention_mask.shape[0], image_tokens, dtype=torch.bool, device=txt_attention_mask.device
    )
    return torch.cat((txt_attention_mask.bool(), image), dim=1)[:, None, None, :]
