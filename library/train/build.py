"""What is trained, built from the options: root module, network, optimizer, schedule."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from rich.console import Console
from torch import nn

from library import randomness
from library.adapters.flux import TEXT_LENGTHS, FluxAdapter, FluxTrainModule, ForwardSettings
from library.adapters.pictures import image_encoder
from library.config.prompts import LoadedPrompts, SamplePrompt, load_prompts
from library.config.sections.memory import MemoryConfig
from library.config.train_config import TrainConfig
from library.data.dataset import TrainingData
from library.data.records import TextCond
from library.distributed.base import Backend, World
from library.models.flux import Flux
from library.models.text_encoders import ClipL, T5Encoder
from library.optim import factory, schedules
from library.optim.factory import BuiltOptimizer
from library.optim.schedules import Schedule
from library.preflight.facts import Told
from library.startup import StartClock
from library.train.checkpoint import SavedRun
from library.train.ema import Ema
from library.train.graphs import has_chance
from library.train.image_losses import LEAST_IMAGES, LossByImage
from library.train.loading import ModelLoader
from library.train.prepare import Data, trains_text
from library.train.resume import Rememberer, Resumable
from library.train.sample_losses import SampleLosses
from library.train.speed import Speed
from library.train.state import TrainState
from networks import plugins
from networks.interface import NetworkHandle, create, merge_base_weights

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """All that is known when building starts: checked, cached, with its first state."""

    config: TrainConfig
    backend: Backend
    console: Console
    loader: ModelLoader
    data: Data
    saved: SavedRun | None
    state: TrainState
    prompts: tuple[SamplePrompt, ...]
    conditions: Mapping[str, TextCond]  # of the sample prompts, by text
    clock: StartClock = field(default_factory=StartClock)  # what it took to get here
    told: Told | None = None  # on the main rank


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained:
    """What is trained, and with what."""

    root: FluxTrainModule
    network: NetworkHandle
    optimizer: BuiltOptimizer
    schedule: Schedule

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Everything the optimizer updates."""
        return [p for group in self.optimizer.optimizer.param_groups for p in group["params"]]

    def resumable(self, backend: Backend, extras: Mapping[str, Rememberer] | None = None) -> Resumable:
        """The parts that a state folder holds."""
        return Resumable(
            network=self.network.module, optimizer=self.optimizer, schedule=self.schedule, backend=backend,
            extras=extras or {},
        )  # fmt: skip


def check_parts(config: TrainConfig) -> tuple[str, ...]:
    """Look at network module, network_args and optimizer, so that what is wrong is said before anything is loaded.

    Returns how the optimizer's options are read where that is not plain.
    """
    plugins.check(config.network)
    return factory.check(config.optimizer)


def check_schedule(config: TrainConfig, total_steps: int) -> tuple[str, ...]:
    """Look at the learning rate schedule before anything is loaded. Returns what there is to say about it."""
    if factory.sets_own_rate(config.optimizer):
        return ()
    return schedules.check(config.schedule, base_lr=config.optimizer.learning_rate, total_steps=total_steps)


def wanted_prompts(config: TrainConfig) -> LoadedPrompts:
    """The sample prompts, if any image will be drawn, and what there is to say about them."""
    sampling = config.sampling
    wanted = sampling.sample_at_first or sampling.sample_every_n_steps or sampling.sample_every_n_epochs
    if not wanted or sampling.sample_prompts is None:
        return LoadedPrompts((), ())
    return load_prompts(sampling.sample_prompts)


def build_trained(job: Job) -> Trained:
    """Load the transformer and the live text encoders, put the network on them, make optimizer and schedule."""
    config, device, loader = job.config, job.backend.load_device, job.loader
    speed = Speed(config, job.backend.world.device)
    steps = job.data.plan.total_steps - job.state.step
    speed.before_weights(steps=steps)
    transformer = loader.transformer(device)
    clip_l, t5 = live_text_encoders(config, loader, device)
    job.clock.mark("weights")
    encoders: list[nn.Module] = [e for e in (clip_l, t5) if e is not None] if trains_text(config) else []
    # Initial weights come from torch's global generator: the same on every rank, whatever ran before.
    torch.manual_seed(randomness.integer(job.state.seed, "network initialisation"))
    if config.network.base_weights and config.memory.fp8_base:
        logger.warning(
            "base_weights with fp8_base: the weights are in 8 bits already, so most of what a file adds is rounded "
            "away; merge it into the model file first, or leave fp8_base out"
        )
    merge_base_weights(config.network, text_encoders=encoders, transformer=transformer)
    speed.before_network(transformer)
    job.clock.mark("attention")
    network = create(config.network, text_encoders=encoders, transformer=transformer)
    network.prepare(config.flat())
    network.apply()
    if job.data.training.preserves:
        network.set_multiplier(1.0)  # a network that cannot is refused here, not in the first step
    if config.network.scale_weight_norms and not network.limits_norms:
        logger.warning(
            "scale_weight_norms: %s has no norms to limit, so it has no effect", config.network.network_module
        )
    _place(network, config, device)
    _save_memory(config.memory, transformer, clip_l, t5, network, chance=has_chance(config.network))
    groups = network.parameter_groups(
        learning_rate=config.optimizer.learning_rate,
        unet_lr=config.optimizer.unet_lr,
        text_encoder_lr=config.optimizer.text_encoder_lr,
    )
    # DeepSpeed takes the optimizer apart, and puts its states where it likes.
    optimizer = factory.build(config.optimizer, groups, may_fuse=not config.distributed.uses_deepspeed)
    schedule = schedules.build(
        config.schedule,
        optimizer,
        base_lr=config.optimizer.learning_rate,
        total_steps=job.data.plan.total_steps,
    )
    for notice in (*optimizer.notices, *schedule.notices):
        logger.warning(notice)
    root = FluxTrainModule(
        transformer=transformer,
        network=network.module,
        clip_l=clip_l,
        t5=t5,
        settings=ForwardSettings(
            guidance_scale=config.objective.guidance_scale,
            apply_t5_attn_mask=config.model.apply_t5_attn_mask,
            autocast_dtype=loader.autocast_dtype,
            train_clip_l=network.trains_clip_l and clip_l is not None,
            train_t5=network.trains_t5,
        ),
    )
    root.train()
    job.clock.mark("network")
    speed.after_network(transformer, steps=steps, shapes=token_shapes(job))
    return Trained(root=root, network=network, optimizer=optimizer, schedule=schedule)


def build_adapter(job: Job, trained: Trained) -> FluxAdapter:
    """What turns batches into inputs: tokenizers if an encoder is live, the autoencoder if latents are not cached."""
    device = job.backend.world.device
    live = trained.root.clip_l is not None or trained.root.t5 is not None
    cached = job.config.caching.cache_latents
    return FluxAdapter(
        device=device,
        tokenizers=job.loader.tokenizers if live else None,
        encode_images=None if cached else image_encoder(job.loader.autoencoder(), device),
        seed=job.state.seed,
        drop_padding=job.config.model.apply_t5_attn_mask,
    )


def build_ema(job: Job, trained: Trained) -> Ema | None:
    """The average that the options ask for, not begun yet."""
    averaging = job.config.averaging
    if averaging.ema_decay is None:
        return None
    module = trained.network.module
    return Ema(module, backend=job.backend, decay=averaging.ema_decay, on_cpu=averaging.ema_on_cpu)


def sample_losses(data: TrainingData, *, rows: int, world: World) -> SampleLosses | None:
    """What brings the losses of samples to the main rank, at most `rows` of a rank in a step."""
    images = _comparable(data)
    return SampleLosses(images, rows=rows, world=world) if images else None


def loss_by_image(data: TrainingData) -> LossByImage | None:
    """What keeps losses by picture."""
    images = _comparable(data)
    return LossByImage(images) if images else None


def _comparable(data: TrainingData) -> tuple[str, ...]:
    """Keys of the pictures whose losses can be compared, if they are enough; others have targets of their own."""
    records = (record for record in data.records if not record.is_reg and not data.subset(record).preserves)
    images = tuple(record.key for record in records)
    return images if len(images) >= LEAST_IMAGES else ()


def live_text_encoders(
    config: TrainConfig, loader: ModelLoader, device: torch.device
) -> tuple[ClipL | None, T5Encoder | None]:
    """The encoders that run in every step: those that are trained, and both if their outputs are not cached."""
    cached = config.caching.cache_text_encoder_outputs
    clip_l = loader.clip_l(device) if not cached or trains_text(config) else None
    t5 = loader.t5(device) if not cached else None
    return clip_l, t5


def token_shapes(job: Job) -> int:
    """How many sizes of token streams a run sees: its buckets, and lengths of text where padding is left out."""
    buckets = {placement.bucket for placement in job.data.training.placements}
    lengths = -(-job.loader.t5_length // TEXT_LENGTHS) if job.config.model.apply_t5_attn_mask else 1
    return len(buckets) * lengths


def _place(network: NetworkHandle, config: TrainConfig, device: torch.device) -> None:
    """Trained weights are float32, but 16 bits with full_bf16 and full_fp16."""
    training = config.training
    half = torch.bfloat16 if training.full_bf16 else torch.float16 if training.full_fp16 else None
    network.module.to(device=device, dtype=half or torch.float32)


def _save_memory(
    memory: MemoryConfig,
    transformer: Flux,
    clip_l: ClipL | None,
    t5: T5Encoder | None,
    network: NetworkHandle,
    *,
    chance: bool,
) -> None:
    """Put the memory options in effect; base weights and network are final by now."""
    if memory.blocks_to_swap:
        swap = transformer.enable_block_swap(memory.blocks_to_swap)
        logger.info(
            "blocks_to_swap = %d: %d blocks take turns on the GPU, %.1f GB wait in main memory",
            memory.blocks_to_swap, swap.num_blocks, swap.host_bytes / 1e9,
        )  # fmt: skip
    if not memory.gradient_checkpointing:
        return
    blocks = memory.recompute_blocks
    transformer.enable_gradient_checkpointing(
        blocks=blocks if isinstance(blocks, int) else None,  # auto begins with all
        offload_inputs=memory.cpu_offload_checkpointing,
        cheap_only=memory.recompute == "cheap",
        chance=chance,
    )
    network.enable_gradient_checkpointing()
    encoders: Sequence[ClipL | T5Encoder | None] = (clip_l, t5)
    for encoder in encoders:
        if encoder is not None:
            encoder.enable_gradient_checkpointing()
