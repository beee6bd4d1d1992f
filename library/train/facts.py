"""The metadata of a run's files: facts gathered once, and what changes from save to save."""

from __future__ import annotations

import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import library
from library.data.discover import tag_frequency
from library.files.dataset_metadata import BucketFacts, DatasetFacts
from library.files.hashes import file_sha256, short_hash
from library.files.metadata import ModelFacts, RunFacts, at_save, build
from library.train.build import Job, Trained
from library.train.prepare import Data
from library.train.state import TrainState
from library.train.trigger import trigger_words
from networks.plugins import metadata_arguments


class MetadataWriter:
    """Metadata of a file saved now. The base model is hashed whole, in the background: slow disks take minutes."""

    def __init__(self, job: Job, trained: Trained) -> None:
        self._job, self._trained = job, trained
        self._base: Mapping[str, str] | None = None
        self._model: Future[ModelFacts] | None = None
        self._vae: Future[ModelFacts] | None = None
        if job.backend.world.is_main:
            pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="model-hash")
            name = cast(str, job.config.model.pretrained_model_name_or_path)
            self._model = pool.submit(model_facts, name, job.loader.files.transformer)
            vae = job.config.other.vae  # nothing reads it, but Kohya writes down that it was named
            if vae is not None:
                self._vae = pool.submit(model_facts, vae, Path(vae))
            pool.shutdown(wait=False)

    def __call__(self, state: TrainState, epoch: int) -> dict[str, str]:
        """Metadata of a file saved at `state`; `epoch` is what ss_epoch says. Main rank only."""
        if self._base is None:
            assert self._model is not None, "only the main rank saves"
            self._base = build(self._job.config, self._facts(state, self._model.result()))
        return at_save(self._base, step=state.step, epoch=epoch, finished_at=time.time())

    def _facts(self, state: TrainState, model: ModelFacts) -> RunFacts:
        job, plan, optimizer = self._job, self._job.data.plan, self._trained.optimizer
        return RunFacts(
            session_id=state.session_id,
            started_at=state.started_at,
            seed=state.seed,
            datasets=dataset_facts(job.data),
            num_validation_images=len(job.data.discovered.validation),
            num_batches_per_epoch=-(-plan.batches_per_epoch // job.backend.world.size),
            num_epochs=plan.num_epochs,
            max_train_steps=plan.total_steps,
            world_size=job.backend.world.size,
            optimizer=optimizer.description,
            model=model,
            vae=self._vae.result() if self._vae is not None else None,
            is_schnell=not job.loader.files.is_dev,
            network_args=metadata_arguments(job.config.network),
            trigger_words=trigger_words(job.data.datasets),
            single_text_encoder_lr=self._trained.network.single_text_encoder_lr,
            optimizer_sets_rate=optimizer.sets_own_rate and not optimizer.is_schedule_free,
            trainer_version=f"polyrank/{library.__version__}",
        )


def model_facts(name: str, path: Path) -> ModelFacts:
    """Name and hashes of the base model; a folder or a model in several files has none, as in Kohya."""
    if not path.is_file():
        return ModelFacts(name=path.name)
    shown = path.name if Path(name).exists() else name
    return ModelFacts(name=shown, short_hash=short_hash(path), sha256=file_sha256(path))


def dataset_facts(data: Data) -> tuple[DatasetFacts, ...]:
    """What each dataset turned out to hold."""
    frequency = tag_frequency(data.discovered)
    facts = []
    for number, settings in enumerate(data.datasets):
        reports = [report for report in data.discovered.subsets if report.dataset == number]
        counts = {report.subset: report.num_images for report in reports}
        facts.append(
            DatasetFacts(
                settings=settings,
                image_counts=tuple(counts.get(index, 0) for index in range(len(settings.subsets))),
                num_train_images=sum(r.num_images * r.num_repeats for r in reports if not r.is_reg),
                num_reg_images=sum(r.num_images * r.num_repeats for r in reports if r.is_reg),
                tag_frequency={r.name: frequency[r.name] for r in reports if frequency[r.name]},
                buckets=_buckets(data.training.bucket_info(number)) if settings.enable_bucket else None,
            )
        )
    return tuple(facts)


def _buckets(info: Mapping[str, Any]) -> BucketFacts:
    return BucketFacts(
        buckets=tuple((tuple(b["resolution"]), b["count"]) for b in info["buckets"].values()),
        mean_aspect_error=info["mean_img_ar_error"],
    )
