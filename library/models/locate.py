"""A model reference of the configuration to a path: the embedded model by its name, anything else on disk.

Nothing is downloaded: the real models are gated or large, and a trainer that starts a 24 GB download
unasked helps nobody. A repository of the Hugging Face Hub that another program left in the cache of
this machine is used from there. What a path holds is checked when it is loaded, in `library.models.identify`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

from library.errors import CheckpointError
from library.files.safetensors import similar_name
from library.models import tiny

# Component to its file or folder inside the embedded model.
_TINY: Mapping[str, str] = {
    "flux": "flux.safetensors",
    "ae": "ae.safetensors",
    "clip_l": "clip_l.safetensors",
    "t5xxl": "t5xxl.safetensors",
    "tokenizers": "tokenizers",
}
_FILES = (".safetensors", ".sft", ".gguf", ".pt", ".pth", ".ckpt", ".bin")
_HUB_NAME = re.compile(r"^[A-Za-z0-9][\w.-]*/[\w.-]+$")


def locate(reference: str, component: str, option: str) -> Path:
    """The path that `reference`, the value of `option`, stands for.

    `component` is "flux", "ae", "clip_l", "t5xxl" or "tokenizers": which part of the embedded model is meant.

    Raises:
        CheckpointError: nothing is there; says what else is close by.
    """
    if reference == tiny.NAME:
        return tiny.ensure_tiny_flux() / _TINY[component]
    path = Path(reference).expanduser()
    if path.exists():
        return path
    if _HUB_NAME.match(reference) and path.suffix.lower() not in _FILES and not path.parent.is_dir():
        try:
            return Path(huggingface_hub.snapshot_download(reference, local_files_only=True))
        except (LocalEntryNotFoundError, HFValidationError):
            raise CheckpointError(
                f"--{option} {reference} is not a file or folder here, nor in the cache of Hugging Face; download the "
                f"model first (`hf download {reference}`), or use {tiny.NAME}."
            ) from None
    raise CheckpointError(f"--{option} {path} does not exist.{similar_name(path)}")
