"""Drawing prompts with adapter files at chosen strengths, on one base model that is loaded once."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL.Image import Image

from library.adapters.flux import FluxTrainModule, ForwardSettings
from library.adapters.preview import FluxPreviewer
from library.config.prompts import SamplePrompt
from library.config.train_config import TrainConfig
from library.data.records import TextCond
from library.log import quiet
from library.models.autoencoder import AutoEncoder
from library.models.flux import Flux
from library.models.memory import free_memory
from library.models.params import FluxParams
from library.train.caching import encode_prompts, prompt_texts
from library.train.loading import ModelLoader
from library.train.prepare import locate_models
from networks.interface import NetworkHandle
from networks.trial import changes_text, changes_transformer, worn

BASE = 0.0  # the strength at which every file is the base model
Conditions = Mapping[str, TextCond]


@dataclass(frozen=True, slots=True)
class Picture:
    """One picture of one file, strength and prompt; `prompt` is the position among the prompts."""

    file: Path
    strength: float
    prompt: int
    image: Image


def draw_all(
    config: TrainConfig,
    files: Sequence[Path],
    strengths: Sequence[float],
    prompts: Sequence[SamplePrompt],
    *,
    device: torch.device,
) -> Iterator[Picture]:
    """Every prompt with every file at every strength, file by file. The base model is drawn once.

    Text encoders are loaded first and given back before the transformer is loaded. UserError for what cannot be read.
    """
    loader = ModelLoader(config, locate_models(config.model))
    with torch.no_grad():
        texts = _texts(config, loader, files, strengths, prompt_texts(prompts), device)
        free_memory()
        transformer = loader.transformer(device)
        studio = _Studio(config, loader, transformer, loader.autoencoder(), device)
        base: dict[int, Image] = {}
        for file in files:
            with ExitStack() as stack:
                network: NetworkHandle | None = None
                if changes_transformer(file):
                    with quiet(logging.ERROR):  # that layers of text encoders are not for the transformer
                        network = stack.enter_context(
                            worn(
                                file, config.network, transformer=transformer, text_encoders=(), on_text=False
                            )
                        )
                for strength in strengths:
                    draw = studio.previewer(network, texts[(file, strength)])
                    for number, prompt in enumerate(prompts):
                        if strength == BASE and number in base:
                            yield Picture(file, strength, number, base[number])
                            continue
                        image = draw.picture(draw.latents(replace(prompt, strength=strength)))
                        if strength == BASE:
                            base[number] = image
                        yield Picture(file, strength, number, image)


def _texts(
    config: TrainConfig,
    loader: ModelLoader,
    files: Sequence[Path],
    strengths: Sequence[float],
    prompts: Sequence[str],
    device: torch.device,
) -> dict[tuple[Path, float], Conditions]:
    """Conditions by file and strength: the base's own, but for files that change text encoders."""
    encoders = loader.text_encoders(device)
    plain = encode_prompts(encoders, prompts)
    found: dict[tuple[Path, float], Conditions] = {
        (file, strength): plain for file in files for strength in strengths
    }
    params = loader.files.parts["flux"].params()
    assert isinstance(params, FluxParams)
    with torch.device("meta"):
        stand_in = Flux(params)
    for file in files:
        if not changes_text(file):
            continue
        models = (encoders.clip_l, encoders.t5)
        with (
            quiet(logging.ERROR),
            worn(file, config.network, transformer=stand_in, text_encoders=models, on_text=True) as network,
        ):
            for strength in strengths:
                network.set_multiplier(strength)
                found[(file, strength)] = encode_prompts(encoders, prompts)
    return found


@dataclass(frozen=True, slots=True)
class _Studio:
    """What all pictures share."""

    config: TrainConfig
    loader: ModelLoader
    transformer: Flux
    autoencoder: AutoEncoder
    device: torch.device

    def previewer(self, network: NetworkHandle | None, texts: Conditions) -> FluxPreviewer:
        """What draws a prompt with the network that the transformer wears now."""
        module = FluxTrainModule(
            transformer=self.transformer,
            network=network.module if network is not None else None,
            clip_l=None,
            t5=None,
            settings=ForwardSettings(
                guidance_scale=self.config.objective.guidance_scale,
                apply_t5_attn_mask=self.config.model.apply_t5_attn_mask,
                autocast_dtype=self.loader.autocast_dtype,
            ),
        )

        def conditions(prompt: str) -> TextCond:
            kept = texts[prompt]
            return TextCond(
                *(part.to(self.device) for part in (kept.clip_pooled, kept.t5_hidden, kept.t5_mask))
            )

        return FluxPreviewer(
            module=module, autoencoder=self.autoencoder, conditions=conditions, device=self.device,
            set_strength=(lambda strength: None) if network is None else network.set_multiplier,
            shifted=self.loader.files.is_dev, seed=self.config.training.seed or 0,
        )  # fmt: skip
