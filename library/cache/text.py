"""The text cache: Kohya's `<image>_flux_te.npz`, with a note of ours on which captions it holds and who
encoded them.

Kohya's five arrays hold the first caption wanted of an image. Where captions change from visit to visit, or
datasets treat one image's caption differently, the others follow in the same file under names with a suffix, in
bfloat16 where that loses nothing. The empty caption, which caption dropout needs, lies once per image folder in
`empty-caption_flux_te.npz`. An entry is stale when a caption (and so an option or seed that shapes it), token
length, encoder or `apply_t5_attn_mask` changed; what a stale file holds of the captions wanted is kept. Kohya's
files carry no note; they hold the caption as it was read, and are taken where that is the one wanted and shapes
and mask option fit.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library import randomness
from library.cache import npz
from library.cache.latents import Entry
from library.cache.variants import Variants
from library.data import captions
from library.data.dataset import TrainingData
from library.data.readers import CachedText
from library.data.records import ImageRecord
from library.errors import DatasetError

NAMES = ("l_pooled", "t5_out", "txt_ids", "t5_attn_mask", "apply_t5_attn_mask")
_READ = ("l_pooled", "t5_out", "t5_attn_mask")
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

    def made(self, note: Mapping[str, object]) -> bool:
        """Whether a file with this note was made with these options."""
        return all(note.get(key) == value for key, value in self.note().items())


@dataclass(frozen=True, slots=True)
class OutputSize:
    """What decides how much room outputs take."""

    clip_width: int
    t5_width: int
    t5_length: int  # tokens
    value_bytes: int  # of one number as the encoders give it

    def of_caption(self, value_bytes: int) -> int:
        """Bytes of one caption's outputs, with so many for a number."""
        return (self.clip_width + self.t5_length * self.t5_width) * value_bytes + 8 * self.t5_length

    def in_memory(self, needs: Iterable[TextNeed]) -> int:
        """About how many bytes the outputs of `needs` take in memory."""
        return len({text for need in needs for text in need.captions}) * self.of_caption(self.value_bytes)

    def on_disk(self, needs: Iterable[TextNeed]) -> int:
        """About how large the files of `needs` become; the first caption of each is in float32, as Kohya's."""
        first = self.of_caption(4) + 12 * self.t5_length  # and txt_ids
        further = self.of_caption(self.value_bytes)
        return sum(first + (len(need.captions) - 1) * further for need in needs)


@dataclass(frozen=True, slots=True)
class TextNeed:
    """One file that training will read, and the captions it must hold, Kohya's first."""

    base: str  # path of the file up to "_flux_te.npz"
    captions: tuple[str, ...]
    is_raw: bool = False  # whether that is one caption as it was read: what Kohya's files hold

    @property
    def path(self) -> Path:
        """Kohya's file name."""
        return text_path(self.base)


@dataclass(slots=True)
class TextStore:
    """Reads entries for training: from the files, or from memory where an entry was put there."""

    variants: Mapping[str, Variants]  # by record key
    memory: dict[str, CachedText] = field(default_factory=dict)  # by caption

    def caption(self, record: ImageRecord, *, visit: int, step: int) -> str:
        """Which of a record's encoded captions a visit trains with that falls into optimizer step `step`."""
        return self.variants[record.key].caption(visit=visit, step=step)

    def read(self, record: ImageRecord, caption: str | None) -> CachedText:
        """Outputs for one of a record's captions, or for the empty one (None), in float32. Raises DatasetError
        if the file cannot be read.
        """
        kept = self.memory.get(caption or "")
        if kept is not None:
            return _full_precision(kept)
        path = text_path(record.cache_base if caption is not None else _empty_base(record))
        try:
            return _full_precision(_read(path, [caption or ""])[caption or ""])
        except npz.UNREADABLE as error:
            raise DatasetError(
                f"the cache file {path} cannot be read any more ({error}); delete it and start again"
            ) from error


def text_path(base: str) -> Path:
    """`<image path without extension>_flux_te.npz`."""
    return Path(base + "_flux_te.npz")


def _empty_base(record: ImageRecord) -> str:
    """What the file of the empty caption is called up to "_flux_te.npz"."""
    return os.path.join(os.path.dirname(record.file), EMPTY_NAME)


def text_needs(
    *sources: tuple[TrainingData, Mapping[str, Variants]],
) -> tuple[tuple[TextNeed, ...], TextStore]:
    """The files that reading all `sources` will ask for, and the store that will read them."""
    wanted: dict[str, dict[str, None]] = {}
    raw: dict[str, str] = {}
    chosen: dict[str, Variants] = {}
    for data, variants in sources:
        chosen |= variants
        for record in data.records:
            base = record.cache_base
            raw[base] = record.caption
            texts = dict.fromkeys(variants[record.key].captions)
            wanted[base] = wanted[base] | texts if base in wanted else texts
            if captions.may_drop(data.subset(record)):
                wanted.setdefault(_empty_base(record), {})[""] = None
    needs = (TextNeed(base, tuple(texts), [*texts] == [raw.get(base)]) for base, texts in wanted.items())
    return tuple(needs), TextStore(chosen)


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
        fits = shapes["t5_out"][:1] == (options.t5_length,) and need.is_raw
        same_mask = bool(small["apply_t5_attn_mask"]) == options.apply_t5_attn_mask
        return Entry.FOREIGN if (fits and same_mask) else Entry.STALE
    note = npz.unpack_note(small[_NOTE])
    if any(name not in shapes for caption in need.captions for name in _names(note, caption) or ["?"]):
        return Entry.STALE
    return Entry.VALID if skip_check or options.made(note) else Entry.STALE


def still_valid(need: TextNeed, *, options: TextOptions) -> dict[str, CachedText]:
    """Those of a need's captions that its file holds already, made with the same `options`."""
    try:
        note = npz.unpack_note(npz.read_arrays(need.path, [_NOTE])[_NOTE])
        held = [caption for caption in need.captions if _names(note, caption)]
        return _read(need.path, held) if held and options.made(note) else {}
    except npz.UNREADABLE:
        return {}


def write_file(need: TextNeed, texts: Sequence[CachedText], *, options: TextOptions) -> None:
    """Write one file with the outputs of its captions, in their order. Raises OSError."""
    arrays: dict[str, npz.Array] = {}
    held = {}
    for number, (caption, text) in enumerate(zip(need.captions, texts, strict=True)):
        held[_hash(caption)] = suffix = "" if number == 0 else f"_{_hash(caption)}"
        if number == 0:
            arrays |= _kohyas_arrays(text, options)
        else:
            arrays |= {f"{name}{suffix}": array for name, array in _further_arrays(text).items()}
    arrays[_NOTE] = npz.pack_note(options.note() | {"captions": held})
    npz.write_arrays(need.path, arrays)


def compacted(text: CachedText) -> CachedText:
    """The same values in half the memory, if a bfloat16 encoder gave them; else as they are."""
    return replace(text, clip_pooled=_compacted(text.clip_pooled), t5_hidden=_compacted(text.t5_hidden))


def _compacted(tensor: Tensor) -> Tensor:
    half = tensor.bfloat16()
    return half if tensor.dtype == torch.float32 and torch.equal(half.float(), tensor) else tensor


def _full_precision(text: CachedText) -> CachedText:
    return replace(text, clip_pooled=text.clip_pooled.float(), t5_hidden=text.t5_hidden.float())


def _kohyas_arrays(text: CachedText, options: TextOptions) -> Mapping[str, npz.Array]:
    """Kohya's five arrays; float32, or float16 where the encoder gave that."""
    plain = text if text.t5_hidden.dtype == torch.float16 else _full_precision(text)
    length = text.t5_hidden.shape[0]
    return {
        "l_pooled": plain.clip_pooled.numpy(),
        "t5_out": plain.t5_hidden.numpy(),
        "txt_ids": np.zeros((length, 3), dtype=np.float32),
        "t5_attn_mask": text.t5_mask.numpy(),
        "apply_t5_attn_mask": np.array(options.apply_t5_attn_mask),
    }


def _further_arrays(text: CachedText) -> Mapping[str, npz.Array]:
    """What is read of a further caption; numpy has no bfloat16, so its bits are kept as int16."""
    small = compacted(text)
    values = (small.clip_pooled, small.t5_hidden, small.t5_mask)
    return {
        name: (value.view(torch.int16) if value.dtype == torch.bfloat16 else value).numpy()
        for name, value in zip(_READ, values, strict=True)
    }


def _names(note: Mapping[str, Any], caption: str) -> list[str]:
    """Under which names a file with this note holds a caption; none if it does not."""
    suffix = note.get("captions", {}).get(_hash(caption))
    return [] if suffix is None else [f"{name}{suffix}" for name in _READ]


def _read(path: Path, wanted: Sequence[str]) -> dict[str, CachedText]:
    """Outputs of captions that the file holds; one without a note holds one, whatever it is."""
    texts = {}
    with npz.opened(path) as archive:
        note = npz.unpack_note(archive[_NOTE]) if _NOTE in archive else None
        for caption in wanted:
            names = _READ if note is None else _names(note, caption)
            pooled, hidden, mask = (torch.from_numpy(archive[name]) for name in names)
            texts[caption] = CachedText(_as_stored(pooled), _as_stored(hidden), mask.long())
    return texts


def _as_stored(tensor: Tensor) -> Tensor:
    return tensor.view(torch.bfloat16) if tensor.dtype == torch.int16 else tensor


def _hash(caption: str) -> str:
    return randomness.digest(caption, size=6).hex()
