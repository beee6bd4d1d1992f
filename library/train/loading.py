"""Which model is loaded when, in which precision: one place, so that no two parts load the same file."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from library import randomness
from library.adapters.text import FluxTextEncoders
from library.cache.text import OutputSize, TextOptions
from library.config.train_config import TrainConfig
from library.distributed.precision import DTYPES
from library.errors import CheckpointError
from library.files.hashes import sampled_hash
from library.models.autoencoder import AutoEncoder
from library.models.flux import Flux
from library.models.identify import model_files
from library.models.load import load_autoencoder, load_clip_l, load_flux, load_t5
from library.models.params import ClipParams, T5Params
from library.models.text_encoders import ClipL, T5Encoder
from library.models.tokenizers import T5_LENGTH, FluxTokenizers
from library.train.prepare import ModelFiles
from library.train.speed import Speed


@dataclass(frozen=True)
class ModelLoader:
    """Reads the models of one run from their files."""

    config: TrainConfig
    files: ModelFiles

    @property
    def dtype(self) -> torch.dtype:
        """Kohya's weight_dtype: that of the frozen weights."""
        return DTYPES[self.config.training.mixed_precision]

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """The dtype of autocast; None in full precision."""
        return None if self.dtype is torch.float32 else self.dtype

    @property
    def autoencoder_dtype(self) -> torch.dtype:
        """float32 with no_half_vae."""
        return torch.float32 if self.config.model.no_half_vae else self.dtype

    @property
    def t5_length(self) -> int:
        """Tokens a caption is padded to."""
        given = self.config.model.t5xxl_max_token_length
        return given or T5_LENGTH["dev" if self.files.is_dev else "schnell"]

    @cached_property
    def tokenizers(self) -> FluxTokenizers:
        """Both tokenizers."""
        return FluxTokenizers.load(self.files.tokenizers, t5_length=self.t5_length)

    def any_tokenizers(self) -> FluxTokenizers | None:
        """Both tokenizers, or None where they cannot be had: a run whose text is cached needs none."""
        try:
            return self.tokenizers
        except CheckpointError:
            return None

    def local_tokenizers(self) -> FluxTokenizers | None:
        """Both tokenizers if they are on this machine, without asking a hub."""
        return FluxTokenizers.load_local(self.files.tokenizers, t5_length=self.t5_length)

    def autoencoder(self) -> AutoEncoder:
        """The autoencoder, on the CPU."""
        return load_autoencoder(
            self.files.autoencoder, device="cpu", dtype=self.autoencoder_dtype, mmap=self._mmap
        )

    def clip_l(self, device: torch.device) -> ClipL:
        """CLIP-L on `device`."""
        return load_clip_l(self.files.clip_l, device=device, dtype=self.dtype, mmap=self._mmap)

    def t5(self, device: torch.device) -> T5Encoder:
        """T5 on `device`."""
        memory = self.config.memory
        fp8 = torch.float8_e4m3fn if memory.fp8_base and not memory.fp8_base_unet else None
        return load_t5(self.files.t5, device=device, dtype=self.dtype, weight_dtype=fp8, mmap=self._mmap)

    def text_encoders(self, device: torch.device) -> FluxTextEncoders:
        """Both encoders with their tokenizers, on `device`."""
        return FluxTextEncoders(
            clip_l=self.clip_l(device),
            t5=self.t5(device),
            tokenizers=self.tokenizers,
            apply_t5_attn_mask=self.config.model.apply_t5_attn_mask,
            autocast_dtype=self.autocast_dtype,
        )

    def transformer(self, device: torch.device) -> Flux:
        """The transformer on `device`, its blocks' weights in 8 bits with fp8_base or base_compute, some in
        main memory.

        Files of base_weights are merged into weights without scales: then base_compute comes later.
        """
        speed = Speed(self.config, device)
        early = speed.scaled is not None and not self.config.network.base_weights
        narrow = self.config.memory.fp8_base and not early
        return load_flux(
            self.files.transformer, device=device, dtype=self.dtype, mmap=self._mmap,
            weight_dtype=torch.float8_e4m3fn if narrow else None,
            blocks_to_swap=self.config.memory.blocks_to_swap or 0,
            finish=speed.scale if early else None,
        )  # fmt: skip

    def autoencoder_identity(self) -> str:
        """What cached latents depend on besides the image."""
        return self._identity("ae", self.autoencoder_dtype)

    def text_options(self) -> TextOptions:
        """What cached text outputs depend on besides the caption."""
        return TextOptions(
            encoder=self.text_identity(),
            t5_length=self.t5_length,
            apply_t5_attn_mask=self.config.model.apply_t5_attn_mask,
        )

    def text_size(self) -> OutputSize:
        """How large the text encoders' outputs are."""
        clip_l, t5 = (self.files.parts[kind].params() for kind in ("clip_l", "t5xxl"))
        assert isinstance(clip_l, ClipParams)
        assert isinstance(t5, T5Params)
        return OutputSize(clip_l.hidden_size, t5.d_model, self.t5_length, self.dtype.itemsize)

    def text_identity(self) -> str:
        """Both text encoders and their precision."""
        return f"{self._identity('clip_l', self.dtype)}+{self._identity('t5xxl', self.dtype)}"

    @property
    def _mmap(self) -> bool:
        return not self.config.model.disable_mmap_load_safetensors

    def _identity(self, kind: str, dtype: torch.dtype) -> str:
        """A sampled hash of a model's files: enough to tell two models apart without reading them whole."""
        path = {"ae": self.files.autoencoder, "clip_l": self.files.clip_l, "t5xxl": self.files.t5}[kind]
        samples = [sampled_hash(file) for file in model_files(path, component=kind)]
        return randomness.digest(samples, dtype, size=8).hex()
