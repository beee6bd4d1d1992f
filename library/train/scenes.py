"""What pictures of a run are made of, in names that ComfyUI knows: for each sample picture, and for each file saved."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from library.adapters.sampling import seed_of
from library.config.prompts import SamplePrompt
from library.config.sections.saving import SavingConfig
from library.files.comfyui import Adapter, ModelNames, Scene
from library.models.identify import model_files
from library.train.naming import average_stem, last_stem, model_path, saved_at
from library.train.prepare import ModelFiles
from library.train.trigger import trigger_words

if TYPE_CHECKING:
    from library.train.build import Job, Trained

STRENGTH = 0.8  # of an adapter in a workflow to begin with
SIDE = 1024  # pixels
STEPS: Mapping[bool, int] = {True: 20, False: 4}  # dev, schnell

# What the files are called where everybody gets them, for a model that is a folder here.
_USUAL: Mapping[str, str] = {
    "clip_l": "clip_l.safetensors", "t5xxl": "t5xxl_fp16.safetensors", "ae": "ae.safetensors",
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenes:
    """Makes scenes; `example` is the prompt of a workflow that belongs to a file."""

    models: ModelNames
    saving: SavingConfig
    steps_per_epoch: int
    num_epochs: int
    total_steps: int
    averaged: bool  # pictures are drawn with the average of weights
    run_seed: int
    changes_text: bool
    start: str | None  # the adapter file that training began with
    example: SamplePrompt

    def picture(self, prompt: SamplePrompt, step: int) -> Scene:
        """The scene of a sample picture drawn after `step` optimizer steps."""
        file, note = self._file_at(step)
        adapter = Adapter(file, prompt.strength, self.changes_text) if file else None
        return Scene(
            models=self.models, adapter=adapter, prompt=prompt, seed=seed_of(prompt, run_seed=self.run_seed),
            keeps_seed=True, prefix=Path(file or last_stem(self.saving.output_name)).stem,
            note=f"{note}\n\n{_places(self.models, adapter)}",
        )  # fmt: skip

    def file(self, path: Path) -> Scene:
        """The scene that tries out the network file `path`."""
        adapter = Adapter(path.name, STRENGTH, self.changes_text)
        note = (
            f"{path.name}, at strength {STRENGTH:g}: less is nearer to the base model, 1 is what was trained.\n\n"
            f"{_places(self.models, adapter)}"
        )
        return Scene(
            models=self.models, adapter=adapter, prompt=self.example,
            seed=seed_of(self.example, run_seed=self.run_seed), keeps_seed=False, prefix=path.stem, note=note,
        )  # fmt: skip

    def _file_at(self, step: int) -> tuple[str | None, str]:
        """The adapter file that holds the weights of `step`, or what comes nearest, and what to say of it."""
        if not step:
            return self.start, "Drawn before the first step."
        stem = saved_at(
            self.saving, step=step, steps_per_epoch=self.steps_per_epoch, num_epochs=self.num_epochs,
            total_steps=self.total_steps,
        )  # fmt: skip
        if stem is not None:
            return self._file(stem), f"Drawn at step {step}."
        last = self._file(last_stem(self.saving.output_name))
        return last, f"Drawn at step {step}, where no file was saved; {last} is of the run's end."

    def _file(self, stem: str) -> str:
        """The file saved under `stem` that holds the weights that pictures are drawn with."""
        return model_path(self.saving, average_stem(stem) if self.averaged else stem).name


def scenes(job: Job, trained: Trained) -> Scenes:
    """The scenes of a run."""
    config, plan, settings = job.config, job.data.plan, trained.root.settings
    start = config.network.network_weights
    return Scenes(
        models=model_names(job.loader.files),
        saving=config.saving,
        steps_per_epoch=plan.steps_per_epoch,
        num_epochs=plan.num_epochs,
        total_steps=plan.total_steps,
        averaged=config.averaging.ema_for_samples,
        run_seed=job.state.seed,
        changes_text=settings.train_clip_l or settings.train_t5,
        start=Path(start).name if start is not None else None,
        example=example_prompt(job),
    )


def example_prompt(job: Job) -> SamplePrompt:
    """The first sample prompt that is drawn at full strength; without one a caption, the trigger word before it."""
    for prompt in job.prompts:
        if prompt.strength == 1:
            return prompt
    words = ", ".join(trigger_words(job.data.datasets))
    caption = next((r.caption for r in job.data.training.records if not r.is_reg and r.caption), "")
    text = caption if words in caption else ", ".join(part for part in (words, caption) if part)
    steps = STEPS[job.loader.files.is_dev]
    return SamplePrompt(index=0, prompt=text, width=SIDE, height=SIDE, sample_steps=steps)


def model_names(files: ModelFiles) -> ModelNames:
    """The names of the model files; a folder, shards, and a file that holds several models get the usual names."""
    transformer = files.transformer
    usual = "flux1-dev.safetensors" if files.is_dev else "flux1-schnell.safetensors"
    others = {"clip_l": files.clip_l, "t5xxl": files.t5, "ae": files.autoencoder}
    names = {
        kind: path.name if _is_one_file(path, kind) and path != transformer else _USUAL[kind]
        for kind, path in others.items()
    }
    return ModelNames(
        transformer=transformer.name if _is_one_file(transformer, "flux") else usual,
        clip_l=names["clip_l"], t5=names["t5xxl"], autoencoder=names["ae"], embeds_guidance=files.is_dev,
    )  # fmt: skip


def _is_one_file(path: Path, kind: str) -> bool:
    return path.is_file() and model_files(path, component=kind) == [path]


def _places(models: ModelNames, adapter: Adapter | None) -> str:
    """Which file belongs where."""
    lines = [
        f"models/diffusion_models: {models.transformer}",
        f"models/text_encoders: {models.t5}, {models.clip_l}",
        f"models/vae: {models.autoencoder}",
    ]
    return "\n".join([*lines, *([f"models/loras: {adapter.file}"] if adapter else [])])
