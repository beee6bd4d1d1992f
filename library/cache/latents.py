"""The latents cache: Kohya's `<image>_<W>x<H>_flux.npz`, with a note of ours on what each entry was made
from.

One file holds several resolutions; the names of its arrays end in latent height x width. Kohya trusts any
file that has the arrays; here an entry is stale when the image's bytes, the encoder or the way to the pixels
changed. Kohya's entries carry no note and are taken if their shapes fit, unless the image is stored rotated,
which Kohya ignores. Images of one stem: see `ImageRecord.cache_name`. Encoding is `build.py`'s business.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.cache import npz, source
from library.data.buckets import Placement, Size, crop_box
from library.data.dataset import TrainingData
from library.data.decode import PIXELS_VERSION
from library.data.readers import CachedLatents
from library.data.records import ImageRecord
from library.data.resize import effective_interpolation
from library.errors import ConfigError, DatasetError

CELL = 8  # pixels of one latent cell
CHANNELS = 16


class Entry(Enum):
    """What a look at the cache found."""

    VALID = "valid"
    FOREIGN = "foreign"  # valid, without a note of ours
    MISSING = "missing"
    STALE = "stale"
    UNREADABLE = "unreadable"

    @property
    def usable(self) -> bool:
        """Whether nothing has to be made anew."""
        return self in (Entry.VALID, Entry.FOREIGN)


@dataclass(frozen=True, slots=True)
class LatentNeed:
    """One entry that training will read."""

    record: ImageRecord
    placement: Placement
    interpolation: str  # as it will be used
    flip: bool
    mask: bool

    @property
    def path(self) -> Path:
        """Kohya's file name, with the image's size."""
        return latents_path(self.record)

    @property
    def suffix(self) -> str:
        """End of the names of this entry's arrays."""
        return suffix_of(self.placement.bucket)

    @property
    def names(self) -> tuple[str, ...]:
        """Arrays that must be there."""
        parts = [
            "latents",
            *(["latents_flipped"] if self.flip else []),
            *(["alpha_mask"] if self.mask else []),
        ]
        return tuple(part + self.suffix for part in parts)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Their shapes."""
        width, height = self.placement.bucket
        latent, mask = (CHANNELS, height // CELL, width // CELL), (height, width)
        return {name: mask if name.startswith("alpha_mask") else latent for name in self.names}

    def note(self, encoder: str) -> dict[str, object]:
        """What the entry is made from, besides the image's bytes."""
        return {
            "encoder": encoder,
            "interpolation": self.interpolation,
            "resized": list(self.placement.resized),
            "pixels": PIXELS_VERSION,
        }


@dataclass(frozen=True, slots=True)
class LatentEntry:
    """Arrays of one entry."""

    latents: Tensor  # [16, h, w] float32
    flipped: Tensor | None  # [16, h, w] float32
    mask: Tensor | None  # [H, W] float32 in 0..1


@dataclass(slots=True)
class LatentStore:
    """Reads entries for training: from the files, or from memory where an entry was put there."""

    memory: dict[tuple[Path, Size], LatentEntry] = field(default_factory=dict)  # by cache file and bucket

    def read(self, record: ImageRecord, *, bucket: Size, flipped: bool, mask: bool) -> CachedLatents:
        """One image's latents. Raises DatasetError if the file went missing or is damaged."""
        path = latents_path(record)
        kept = self.memory.get((path, bucket))
        if kept is not None:
            latents = kept.flipped if flipped else kept.latents
            assert latents is not None
            return CachedLatents(latents, kept.mask if mask else None)
        suffix = suffix_of(bucket)
        names = [
            ("latents_flipped" if flipped else "latents") + suffix,
            *(["alpha_mask" + suffix] if mask else []),
        ]
        try:
            arrays = npz.read_arrays(path, names)
        except npz.UNREADABLE as error:
            raise DatasetError(
                f"the cache file {path} cannot be read any more ({error}); delete it and start again"
            ) from error
        tensors = [torch.from_numpy(arrays[name].astype(np.float32)) for name in names]
        return CachedLatents(tensors[0], tensors[1] if mask else None)


def latents_path(record: ImageRecord) -> Path:
    """`<image path without extension>_<W:04d>x<H:04d>_flux.npz`, the size being the upright image's."""
    width, height = record.size
    return Path(f"{record.cache_base}_{width:04d}x{height:04d}_flux.npz")


def suffix_of(bucket: Size) -> str:
    """`_<h>x<w>` in latent cells."""
    return f"_{bucket[1] // CELL}x{bucket[0] // CELL}"


def latent_needs(*sources: TrainingData) -> tuple[LatentNeed, ...]:
    """What reading all `sources` (training and validation data) will ask for, each entry once.

    Raises ConfigError where two datasets want one entry made in two ways.
    """
    found: dict[tuple[object, ...], LatentNeed] = {}
    for data in sources:
        for record, placement in zip(data.records, data.placements, strict=True):
            need = _need(data, record, placement)
            key = (record.cache_base, record.size, placement.bucket)  # what decides file and arrays
            other = found.get(key)
            found[key] = need if other is None else _merged(other, need)
    return tuple(found.values())


def _need(data: TrainingData, record: ImageRecord, placement: Placement) -> LatentNeed:
    subset = data.subset(record)
    assert not subset.random_crop, "random crops cannot be cached"
    assert not subset.color_aug, "changing colours cannot be cached"
    method = effective_interpolation(record.size, placement.resized, data.interpolation(record))
    return LatentNeed(record, placement, method, subset.flip_aug, subset.alpha_mask)


def _merged(first: LatentNeed, second: LatentNeed) -> LatentNeed:
    if first.note("") != second.note(""):
        raise ConfigError(
            f"two datasets want {first.record.path} in one bucket but scaled differently, which one cache "
            "file cannot hold; give them the same resize_interpolation and bucket_no_upscale"
        )
    return replace(first, flip=first.flip or second.flip, mask=first.mask or second.mask)


def check_file(needs: Iterable[LatentNeed], *, encoder: str, skip_check: bool = False) -> list[Entry]:
    """State of the entries of one file, which all `needs` share. `skip_check` asks for the arrays only."""
    wanted = list(needs)
    path = wanted[0].path
    if not path.is_file():
        return [Entry.MISSING] * len(wanted)
    try:
        shapes = npz.read_shapes(path)
        names = [_note_name(need) for need in wanted if _note_name(need) in shapes]
        notes = {name: npz.unpack_note(array) for name, array in npz.read_arrays(path, names).items()}
    except npz.UNREADABLE:
        return [Entry.UNREADABLE] * len(wanted)
    return [_check(need, shapes, notes.get(_note_name(need)), encoder, skip_check) for need in wanted]


def _check(
    need: LatentNeed,
    shapes: Mapping[str, tuple[int, ...]],
    note: Mapping[str, object] | None,
    encoder: str,
    skip_check: bool,
) -> Entry:
    if any(shapes.get(name) != shape for name, shape in need.shapes().items()):
        return Entry.MISSING if need.names[0] not in shapes else Entry.STALE
    if note is None:
        return Entry.FOREIGN if need.record.orientation == 1 else Entry.STALE
    if skip_check:
        return Entry.VALID
    made_from = note.get("source")
    if any(note.get(key) != value for key, value in need.note(encoder).items()):
        return Entry.STALE
    same = isinstance(made_from, dict) and source.unchanged(need.record.path, made_from)
    return Entry.VALID if same else Entry.STALE


def write_entries(entries: Iterable[tuple[LatentNeed, LatentEntry]], *, encoder: str) -> None:
    """Write entries of one file in one go, keeping what else the file holds. Raises OSError."""
    made = list(entries)
    path = made[0][0].path
    try:
        arrays = npz.read_all(path)
    except npz.UNREADABLE:
        arrays = {}
    for need, entry in made:
        for part in ("latents", "latents_flipped", "alpha_mask"):
            arrays.pop(part + need.suffix, None)
        arrays |= _arrays(need, entry)
        note = need.note(encoder) | {"source": source.describe(need.record.path)}
        arrays[_note_name(need)] = npz.pack_note(note)
    npz.write_arrays(path, arrays)


def _arrays(need: LatentNeed, entry: LatentEntry) -> dict[str, npz.Array]:
    """Kohya's arrays of one entry."""
    suffix = need.suffix
    arrays: dict[str, npz.Array] = {
        "latents" + suffix: entry.latents.numpy(),
        "original_size" + suffix: np.array(need.record.size, dtype=np.int64),
        "crop_ltrb" + suffix: np.array(crop_box(need.placement.bucket, need.record.size), dtype=np.float64),
    }
    if entry.flipped is not None:
        arrays["latents_flipped" + suffix] = entry.flipped.numpy()
    if entry.mask is not None:
        arrays["alpha_mask" + suffix] = entry.mask.numpy()
    return arrays


def _note_name(need: LatentNeed) -> str:
    return "polyrank" + need.suffix
