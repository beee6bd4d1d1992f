"""[saving] What is written when, and where a run goes on from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from library.config.options import Limit, no_effect, option

EPOCHS = Limit(ge=1, unit="epochs")
STEPS = Limit(ge=1, unit="steps")


@dataclass(frozen=True, slots=True, kw_only=True)
class SavingConfig:
    """Adapter files, training states, resuming."""

    output_dir: Path | None = option(None, "folder for adapter files and states")
    output_name: str | None = option(None, "base name of the files")
    save_precision: str | None = option(
        None, "precision of saved weights; unset is that of training", choices=("float", "fp16", "bf16")
    )
    save_model_as: str = option(
        "safetensors", "format of adapter files", choices=("ckpt", "pt", "safetensors")
    )
    no_workflow: bool = option(
        False, "write no ComfyUI workflow (NAME.workflow.json) beside adapter files", ours=True
    )
    no_card: bool = option(False, "write no model card (OUTPUT_NAME.md)", ours=True)
    save_every_n_epochs: int | None = option(
        None, "save the adapter every n epochs", limit=EPOCHS, unset=(0,)
    )
    save_every_n_steps: int | None = option(None, "save the adapter every n steps", limit=STEPS, unset=(0,))
    save_n_epoch_ratio: int | None = option(
        None, "save at least this many times, at equal distances in epochs", limit=Limit(ge=1), unset=(0,)
    )
    save_last_n_epochs: int | None = option(
        None, "keep the adapter files of the last n epochs", limit=EPOCHS, unset=(0,)
    )
    save_last_n_epochs_state: int | None = option(
        None, "keep the states of the last n epochs", limit=EPOCHS, unset=(0,)
    )
    save_last_n_steps: int | None = option(
        None, "keep the adapter files of the last n steps", limit=STEPS, unset=(0,)
    )
    save_last_n_steps_state: int | None = option(
        None, "keep the states of the last n steps", limit=STEPS, unset=(0,)
    )
    save_state: bool = option(False, "save the state of training with each adapter file")
    save_state_on_train_end: bool = option(False, "save the state of training at the end")
    resume: Path | None = option(None, "state folder to go on from")
    initial_epoch: int | None = option(None, "epoch to start at, from 1", limit=Limit(ge=1))
    initial_step: int | None = option(None, "step to start at", limit=Limit(ge=0))
    skip_until_initial_step: bool = option(
        False,
        "count the steps before initial_step as done",
        effect=no_effect("a run always begins with the data of its first step", quiet=True),
    )
    huggingface_repo_id: str | None = option(
        None, "Hugging Face repository, user/name, that each adapter file is uploaded to"
    )
    huggingface_repo_type: str | None = option(
        None, "type of that repository: model, dataset or space; unset is model"
    )
    huggingface_path_in_repo: str | None = option(None, "folder in that repository; unset is its root")
    huggingface_token: str | None = option(
        None, "token for Hugging Face; `hf auth login` or HF_TOKEN is safer"
    )
    huggingface_repo_visibility: str | None = option(
        None, "public or private, for a repository that is made; unset is private"
    )
    save_state_to_huggingface: bool = option(False, "upload states too")
    resume_from_huggingface: bool = option(
        False, "resume names an uploaded state: user/repository/folder[:revision[:type]]"
    )
    async_upload: bool = option(False, "upload in the background, but for the final file")
