"""A run's model and data without a file: random weights, latents and text outputs, made on the spot."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

import torch

from library.config.dataset_settings import DatasetSettings, SubsetSettings
from library.config.train_config import TrainConfig
from library.data.dataset import TrainingData, place_records
from library.data.discover import Discovered
from library.data.plan import Plan, PlanSettings, units_per_step
from library.data.readers import CachedLatents, CachedText
from library.data.records import ImageRecord
from library.files.safetensors import Header, TensorInfo
from library.models import precision
from library.models.flux import Flux
from library.models.identify import Part
from library.models.params import FluxParams
from library.train.loading import ModelLoader
from library.train.prepare import Data, ModelFiles

SIZES = {
    "dev": FluxParams(),
    "tiny": FluxParams(
        vec_in_dim=64, context_in_dim=64, hidden_size=128, num_heads=4, mlp_hidden=512, depth=2,
        depth_single_blocks=2, axes_dim=(8, 12, 12),
    ),
}  # fmt: skip
IMAGES_PER_SIZE = 64


@dataclass(frozen=True)
class RandomLoader(ModelLoader):
    """Makes a transformer of random weights where a run reads one from its file."""

    params: FluxParams = field(default_factory=FluxParams)

    def transformer(self, device: torch.device) -> Flux:
        """Frozen normal weights of deviation 0.02 in the run's dtype, blocks in float8 with fp8_base."""
        torch.manual_seed(0)
        with torch.device("meta"):
            model = Flux(self.params).to(self.dtype)
        model.to_empty(device=device)
        # On a CPU (ZeRO-3 splits from there) twelve billion draws take minutes, so a million are repeated.
        drawn = torch.randn(1 << 20, device=device).mul_(0.02).to(self.dtype)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(False)
            if name.endswith("scale"):
                torch.nn.init.ones_(parameter)
            elif device.type == "cpu":
                repeats = -(-parameter.numel() // drawn.numel())
                parameter.data = drawn.repeat(repeats)[: parameter.numel()].view(parameter.shape)
            else:
                torch.nn.init.normal_(parameter, std=0.02)
        if self.config.memory.fp8_base:
            precision.store_blocks_in_fp8(model)
        return model.eval()


def random_text(params: FluxParams, t5_length: int) -> CachedText:
    """Text outputs that serve every caption."""
    generator = torch.Generator().manual_seed(1)
    return CachedText(
        torch.randn(params.vec_in_dim, generator=generator),
        torch.randn(t5_length, params.context_in_dim, generator=generator),
        torch.ones(t5_length, dtype=torch.long),
    )


@dataclass(frozen=True)
class RandomLatents:
    """A `LatentReader`."""

    def read(
        self, record: ImageRecord, *, bucket: tuple[int, int], flipped: bool, mask: bool
    ) -> CachedLatents:
        """Normal noise of the bucket's size, by record."""
        del flipped, mask
        generator = torch.Generator().manual_seed(int(record.key.rsplit("/", 1)[1]))
        return CachedLatents(torch.randn(16, bucket[1] // 8, bucket[0] // 8, generator=generator), None)


@dataclass(frozen=True)
class RandomText:
    """A `TextReader`."""

    cached: CachedText

    def caption(self, record: ImageRecord, *, visit: int, step: int) -> str:
        """No words: the outputs are random."""
        del record, visit, step
        return ""

    def read(self, record: ImageRecord, caption: str | None) -> CachedText:
        """The same for every caption."""
        del record, caption
        return self.cached


def synthetic_data(
    config: TrainConfig, loader: RandomLoader, sizes: Sequence[tuple[int, int]], *, world: int, images: int
) -> Data:
    """So many cached pictures of each of `sizes`, in buckets of their own."""
    # Pictures of a smaller area keep their size; one of a larger area than this would be scaled down.
    largest = max(sizes, key=lambda size: size[0] * size[1])
    dataset = DatasetSettings(
        resolution=largest, batch_size=config.dataset.train_batch_size, enable_bucket=True, bucket_no_upscale=True,
        bucket_reso_steps=16, subsets=(SubsetSettings(image_dir=Path("synthetic")),),
    )  # fmt: skip
    records = tuple(
        ImageRecord(
            key=f"0/synthetic/{number}", file=f"synthetic/{number}.png", size=size, caption="",
            num_repeats=1, dataset=0, subset=0,
        )
        for number, size in enumerate(size for size in sizes for _ in range(images))
    )  # fmt: skip
    training = TrainingData(
        datasets=(dataset,),
        records=records,
        placements=place_records((dataset,), records),
        seed=0,
        latents=RandomLatents(),
        text=RandomText(random_text(loader.params, loader.t5_length)),
    )
    plan = Plan(
        training.planned_images(),
        PlanSettings(
            seed=0,
            batch_sizes=(dataset.batch_size,),
            units_per_step=units_per_step(
                (dataset.batch_size,), world=world, accumulation=config.training.gradient_accumulation_steps,
                global_batch_size=config.training.global_batch_size,
            ),
            max_train_steps=config.training.max_train_steps,
        ),
    )  # fmt: skip
    found = Discovered(records=records, validation=(), subsets=(), notices=())
    return Data((dataset,), found, training, plan, None, None, ())


def random_files(params: FluxParams) -> ModelFiles:
    """No files: only what the header of a transformer of this size would say."""
    nowhere = Path("random")
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in Flux(params).state_dict().items()}
    header = Header(nowhere, {name: TensorInfo("BF16", shape, 0, 0) for name, shape in shapes.items()}, {})
    flux = Part("flux", "bfl", (header,), {name: (0, name) for name in shapes}, {})
    return ModelFiles(nowhere, nowhere, nowhere, nowhere, None, MappingProxyType({"flux": flux}))
