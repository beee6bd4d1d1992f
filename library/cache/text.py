"""The text cache: Kohya's `<image>_flux_te.npz`, with a note of ours on which captions it holds and who
encoded them.

Kohya's five arrays hold the first caption wanted of an image. Where datasets treat one image's caption
differently, the others follow in the same file under names with a suffix. The empty caption, which caption
dropout needs, lies once per image folder in `empty-caption_flux_te.npz`. An entry is stale when caption,
token length, encoder or `apply_t5_attn_mask` changed; Kohya's files carry no note and are taken if shapes and
mask option fit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from library import randomness
from library.cache import npz
from library.cache.latents import Entry
from library.data import captions
from library.data.dataset import TrainingData, cached_caption
from library.data.readers import CachedText
from library.data.records import ImageRecord
from library.errors import DatasetError

NAMES = ("l_pooled", "t5_out", "txt_ids", "t5_attn_mask", "apply_t5_attn_mask")
EMPTY_NAME = "empty-caption"
_NOTE = "polyrank_captions"


@dataclass(frozen=True, slots=True)
class TextOptions:
    """What the outputs depend on besides the caption."""

    encoder: str  # identifies both encoders and their precision
    t5_length: int  # tokens
    apply_t5_attn_mask: bool

    def note(self) -> dict[str, object]:
        """As it is kept in a file."""
        return {"encoder": self.encoder, "t5_length": self.t5_length, "apply": self.apply_t5_attn_mask}


@dataclass(frozen=True, slots=True)
class TextNeed:
    """One file that training will read, and the captions it must hold, Kohya's first."""

    base: Path  # path of the file up to "_flux_te.npz"
    captions: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Kohya's file name."""
        return text_path(self.base)


@dataclass(slots=True)
class TextStore:
    """Reads entries for training: from the files, or from memory where an entry was put there."""

    by_record: dict[str, tuple[Path, str]]  # record key -> base of its file, caption
    memory: dict[tuple[Path, str], CachedText] = field(default_factory=dict)

    def read(self, record: ImageRecord, *, dropped: bool) -> CachedText:
        """Outputs for a record's caption or for the empty one. Raises DatasetError if the file cannot be
        read.
        """
        base, caption = self.by_record[record.key]
        if dropped:
            base, caption = record.path.parent / EMPTY_NAME, ""
        kept = self.memory.get((base, caption))
        if kept is not None:
            return kept
        path = text_path(base)
        try:
            return _read(path, caption)
        except npz.UNREADABLE as error:
            raise DatasetError(
                f"the cache file {path} cannot be read any more ({error}); delete it and start again"
            ) from error


def text_path(base: Path) -> Path:
    """`<image path without extension>_flux_te.npz`."""
    return base.with_name(base.name + "_flux_te.npz")


def text_needs(*sources: TrainingData) -> tuple[tuple[TextNeed, ...], TextStore]:
    """The files that reading all `sources` will ask for, and the store that will read them."""
    wanted: dict[Path, dict[str, None]] = {}
    by_record = {}
    for data in sources:
        for record in data.records:
            caption = cached_caption(data, record)
            by_record[record.key] = (record.cache_base, caption)
            wanted.setdefault(record.cache_base, {})[caption] = None
            if captions.may_drop(data.subset(record)):
                wanted.setdefault(record.path.parent / EMPTY_NAME, {})[""] = None
    needs = tuple(TextNeed(base, tuple(texts)) for base, texts in wanted.items())
    return needs, TextStore(by_record)


def check_file(need: TextNeed, *, options: TextOptions, skip_check: bool = False) -> Entry:
    """State of one file. `skip_check` asks for the arrays only, as in Kohya."""
    if not need.path.is_file():
        return Entry.MISSING
    try:
        shapes = npz.read_shapes(need.path)
        if not all(name in shapes for name in NAMES):
            return Entry.STALE
        small = npz.read_arrays(need.path, ["apply_t5_attn_mask", *([_NOTE] if _NOTE in shapes else [])])
    except npz.UNREADABLE:
        return Entry.UNREADABLE
    if _NOTE not in small:
        fits = shapes["t5_out"][:1] == (options.t5_length,) and len(need.captions) == 1
        same_mask = bool(small["apply_t5_attn_mask"]) == options.apply_t5_attn_mask
        return Entry.FOREIGN if (fits and same_mask) else Entry.STALE
    note = npz.unpack_note(small[_NOTE])
    held = note.get("captions", {})
    if any(name + held.get(_hash(text), "?") not in shapes for text in need.captions for name in NAMES):
        return Entry.STALE
    same = all(note.get(key) == value for key, value in options.note().items())
    return Entry.VALID if same or skip_check else Entry.STALE


def write_file(need: TextNeed, texts: Sequence[CachedText], *, options: TextOptions) -> None:
    """Write one file with the outputs of its captions, in their order. Raises OSError."""
    arrays: dict[str, npz.Array] = {}
    held = {}
    for number, (caption, text) in enumerate(zip(need.captions, texts, strict=True)):
        suffix = "" if number == 0 else f"_{_hash(caption)}"
        held[_hash(caption)] = suffix
        arrays |= {name + suffix: array for name, array in _arrays(text, options).items()}
    arrays[_NOTE] = npz.pack_note(options.note() | {"captions": held})
    npz.write_arrays(need.path, arrays)


def _arrays(text: CachedText, options: TextOptions) -> Mapping[str, npz.Array]:
    """Kohya's five arrays."""
    length = text.t5_hidden.shape[0]
    return {
        "l_pooled": text.clip_pooled.numpy(),
        "t5_out": text.t5_hidden.numpy(),
        "txt_ids": np.zeros((length, 3), dtype=np.float32),
        "t5_attn_mask": text.t5_mask.numpy(),
        "apply_t5_attn_mask": np.array(options.apply_t5_attn_mask),
    }


def _read(path: Path, caption: str) -> CachedText:
    """Outputs of one caption; a file without a note holds only one."""
    shapes = npz.read_shapes(path)
    suffix = ""
    if _NOTE in shapes:
        note = npz.unpack_note(npz.read_arrays(path, [_NOTE])[_NOTE])
        suffix = note["captions"][_hash(caption)]
    arrays = npz.read_arrays(path, [name + suffix for name in NAMES[:2] + NAMES[3:4]])
    pooled, hidden, mask = (torch.from_numpy(array) for array in arrays.values())
    return CachedText(pooled.float(), hidden.float(), mask.long())


def _hash(caption: str) -> str:
    return randomness.digest(caption, size=6).hex()
