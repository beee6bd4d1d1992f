"""Captions to token ids for CLIP-L and T5.

The tokenizers are transformers' own, found in a folder or fetched from the hub once and kept. Padding is
always to full length, because the text encoders of FLUX.1 were trained to see it. No prompt weighting, no
chunks beyond 77.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from library.errors import CheckpointError

CLIP_NAME = "openai/clip-vit-large-patch14"
T5_NAME = "google/t5-v1_1-xxl"
CLIP_LENGTH = 77
T5_LENGTH = {"dev": 512, "schnell": 256}

# Where a folder may keep each tokenizer, in order: Kohya's cache, a diffusers repository, ComfyUI.
CLIP_FOLDERS = ("openai_clip-vit-large-patch14", "tokenizer", "sd1_tokenizer", "comfy/sd1_tokenizer")
T5_FOLDERS = (
    "google_t5-v1_1-xxl",
    "tokenizer_2",
    "t5_tokenizer",
    "text_encoders/t5_tokenizer",
    "comfy/text_encoders/t5_tokenizer",
)
_NEEDED = {
    "clip": (("vocab.json", "merges.txt"), ("tokenizer.json",)),
    "t5": (("tokenizer.json",), ("spiece.model",)),
}


class _Source(NamedTuple):
    hub: str
    folders: tuple[str, ...]


_SOURCES = {"clip": _Source(CLIP_NAME, CLIP_FOLDERS), "t5": _Source(T5_NAME, T5_FOLDERS)}


class Tokens(NamedTuple):
    """Token ids of B captions, padded and truncated, int64."""

    clip: Tensor  # [B, 77]
    t5: Tensor  # [B, L]
    t5_mask: Tensor  # [B, L], 1 = token, 0 = padding


class Pieces(NamedTuple):
    """One word as both tokenizers cut it, without their marks of word ends and beginnings."""

    clip: tuple[str, ...]
    t5: tuple[str, ...]
    unknown: bool  # T5 has no token for a part of it


class FluxTokenizers:
    """Both tokenizers and the T5 length L: 512 for dev, 256 for schnell, or `t5xxl_max_token_length`."""

    def __init__(self, clip: Any, t5: Any, t5_length: int = T5_LENGTH["dev"]) -> None:
        self.clip = clip
        self.t5 = t5
        self.t5_length = t5_length

    @classmethod
    def load(cls, folder: Path | None = None, *, t5_length: int = T5_LENGTH["dev"]) -> FluxTokenizers:
        """Tokenizers from `folder` if it has them, else from the hub (then saved into `folder`).

        Raises:
            CheckpointError: not in `folder`, and the hub cannot be reached; says what to set.
        """
        return cls(_load("clip", folder), _load("t5", folder), t5_length)

    @classmethod
    def load_local(cls, folder: Path | None = None, *, t5_length: int) -> FluxTokenizers | None:
        """Tokenizers from `folder` or from what was fetched before; None if they are not on this machine."""
        try:
            clip, t5 = (_load(kind, folder, local=True) for kind in ("clip", "t5"))
        except CheckpointError:
            return None
        return cls(clip, t5, t5_length)

    def pieces(self, word: str) -> Pieces:
        """How a word is cut into tokens."""
        clip = (piece.removesuffix("</w>") for piece in self.clip.tokenize(word))
        t5 = self.t5.tokenize(word)
        unknown = self.t5.unk_token_id in self.t5.convert_tokens_to_ids(t5)
        return Pieces(tuple(clip), tuple(p for piece in t5 if (p := piece.removeprefix("\u2581"))), unknown)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Ids of `captions`; what does not fit is cut off at the end."""
        texts = list(captions)
        clip = _encode(self.clip, texts, CLIP_LENGTH)
        t5 = _encode(self.t5, texts, self.t5_length)
        return Tokens(clip["input_ids"], t5["input_ids"], t5["attention_mask"])

    def lengths(self, captions: Sequence[str]) -> list[tuple[int, int]]:
        """Tokens each caption needs for (CLIP, T5), before truncation, end tokens included."""
        texts = list(captions)
        clip, t5 = (one(texts, verbose=False)["input_ids"] for one in (self.clip, self.t5))
        return [(len(a), len(b)) for a, b in zip(clip, t5, strict=True)]


def _encode(tokenizer: Any, texts: list[str], length: int) -> dict[str, Tensor]:
    encoded = tokenizer(texts, padding="max_length", truncation=True, max_length=length)
    return {name: torch.tensor(encoded[name], dtype=torch.int64) for name in ("input_ids", "attention_mask")}


def _load(kind: str, folder: Path | None, *, local: bool = False) -> Any:
    names = _SOURCES[kind]
    found = _find(kind, folder, names.folders) if folder else None
    if found is not None:
        return _read(kind, found)
    try:
        fetched = _fetch(kind, local=local)
    except (OSError, ValueError) as error:
        where = f"{folder} has no folder {names.folders[0]}" if folder else "tokenizer_cache_dir is not set"
        raise CheckpointError(
            f"The tokenizer {names.hub} cannot be fetched from the Hugging Face hub and {where}; set "
            f"tokenizer_cache_dir to a folder with {CLIP_FOLDERS[0]}/ and {T5_FOLDERS[0]}/, or to a "
            "diffusers FLUX.1 or ComfyUI folder."
        ) from error
    tokenizer = _read(kind, fetched)
    if folder is not None and not local:
        _keep(tokenizer, folder / names.folders[0])
    return tokenizer


def _read(kind: str, folder: Path) -> Any:
    from transformers import CLIPTokenizerFast, T5TokenizerFast  # noqa: PLC0415 (takes seconds to import)

    make = {"clip": CLIPTokenizerFast, "t5": T5TokenizerFast}[kind]
    try:
        return make.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:
        advice = "" if (folder / "tokenizer.json").exists() else "; `pip install sentencepiece` may be needed"
        raise CheckpointError(
            f"The tokenizer in {folder} cannot be read ({_first_line(error)}){advice}."
        ) from error


def _fetch(kind: str, *, local: bool = False) -> Path:
    """The folder in the hub's cache with the tokenizer's files, downloaded if they are not there and not `local`.

    File by file, because transformers 5 makes an empty tokenizer, without a word, of a name that it cannot
    reach.
    """
    from huggingface_hub import hf_hub_download  # noqa: PLC0415 (belongs to transformers)
    from huggingface_hub.errors import EntryNotFoundError  # noqa: PLC0415

    problem: OSError | ValueError | None = None
    for files in _NEEDED[kind]:
        try:
            paths = [
                Path(hf_hub_download(_SOURCES[kind].hub, file, local_files_only=local)) for file in files
            ]
        except (OSError, ValueError) as error:
            problem = error
            continue
        for extra in ("tokenizer_config.json", "special_tokens_map.json"):
            with suppress(EntryNotFoundError):
                hf_hub_download(_SOURCES[kind].hub, extra, local_files_only=local)
        return paths[0].parent
    assert problem is not None, "every kind has files"
    raise problem


def _find(kind: str, folder: Path, names: Sequence[str]) -> Path | None:
    for candidate in (folder / name for name in names):
        if any(all((candidate / file).is_file() for file in files) for files in _NEEDED[kind]):
            return candidate
    return None


def _keep(tokenizer: Any, target: Path) -> None:
    """Save a fetched tokenizer for runs without a network; another rank may do the same meanwhile."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".{target.name}.{id(tokenizer):x}")
    tokenizer.save_pretrained(str(temporary))
    try:
        temporary.rename(target)
    except OSError:  # it exists: another rank was first, with the same files
        shutil.rmtree(temporary)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]
