"""From resolved datasets to image records: what is trained on, how often, with which caption, and what is
held back.

Every problem of every folder is gathered and raised as one DatasetError. Nothing is dropped in silence: what
Kohya leaves out or fills in is listed in the notices. Pixels are not decoded and nothing depends on rank;
records come out in the same order everywhere.
"""

from __future__ import annotations

import math
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from library import randomness
from library.config.dataset_settings import DatasetSettings, SubsetSettings
from library.data.caption_files import read_captions
from library.data.formats import stem_of
from library.data.headers import Header
from library.data.info_file import read_info, write_info
from library.data.metadata_files import read_metadata
from library.data.problems import Problems, shown
from library.data.records import ImageRecord
from library.data.scan import Listing, list_folder, read_headers, scan
from library.errors import DatasetError


@dataclass(frozen=True, slots=True)
class SubsetReport:
    """What one subset gave, for logs and metadata."""

    dataset: int
    subset: int
    name: str  # base name of its folder or metadata file
    is_reg: bool
    num_repeats: int
    num_images: int  # without repeats, without those held back for validation
    num_validation: int
    tags: tuple[str, ...]  # of each image: its caption, or the tags of the metadata file

    def tag_frequency(self) -> dict[str, int]:
        """Tag -> how often it occurs in the captions."""
        tags = (part.strip().lower() for text in self.tags for part in text.split(","))
        return dict(Counter(tag for tag in tags if tag))


@dataclass(frozen=True, slots=True)
class Discovered:
    """All records: training images with their repeats, and the images held back."""

    records: tuple[ImageRecord, ...]
    validation: tuple[ImageRecord, ...]
    subsets: tuple[SubsetReport, ...]
    notices: tuple[str, ...]  # what may not be meant
    asides: tuple[str, ...] = ()  # what is done with pictures that are in order


class _Found(NamedTuple):
    """One image of a subset before it becomes a record."""

    folder: Path
    name: str
    header: Header
    caption: str
    tags: str
    mask: Path | None = None

    @property
    def path(self) -> Path:
        """Of the image."""
        return self.folder / self.name


def discover(datasets: Sequence[DatasetSettings], *, seed: int) -> Discovered:
    """Read all folders and metadata files. `seed` splits off validation images where no validation_seed is
    set.

    Raises DatasetError naming the first five problems, or saying that there is no image at all.
    """
    problems = Problems()
    notices: list[str] = []
    asides: list[str] = []
    records: list[ImageRecord] = []
    validation: list[ImageRecord] = []
    reports: list[SubsetReport] = []
    for index, dataset in enumerate(datasets):
        of_dataset: list[ImageRecord] = []
        for number, subset in enumerate(dataset.subsets):
            found = _read_subset(subset, problems, notices)
            asides += _transparent(found, subset)
            made = [_record(one, index, number, subset) for one in found]
            kept, held = (_large_enough(part, dataset) for part in _split(made, subset, seed=seed))
            skipped = len(made) - len(kept) - len(held)
            if skipped:
                notices.append(_skipped_notice(skipped, len(made), dataset, subset))
            of_dataset += kept
            validation += [record._replace(num_repeats=1) for record in held]
            reports.append(_report(found, kept, held, index, number, subset))
        records += balance_regularisation(of_dataset, notices)
    problems.check()
    if not records:
        raise DatasetError(
            "there is no training image; check the image folders, num_repeats, validation_split and "
            "skip_image_resolution"
        )
    training, held_back = _with_unique_names(records, validation)
    return Discovered(
        tuple(training),
        tuple(held_back),
        tuple(reports),
        *(tuple(dict.fromkeys(said)) for said in (notices, asides)),
    )


def tag_frequency(discovered: Discovered) -> dict[str, dict[str, int]]:
    """Kohya's ss_tag_frequency: tags counted by folder name over all subsets of that name."""
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for report in discovered.subsets:
        totals[report.name].update(report.tag_frequency())
    return {name: dict(counts) for name, counts in totals.items()}


def _read_subset(subset: SubsetSettings, problems: Problems, notices: list[str]) -> list[_Found]:
    found = (_from_metadata if subset.metadata_file else _from_folder)(subset, problems, notices)
    if found and subset.alpha_mask and not any(one.header.alpha for one in found):
        notices.append(f"{_source(subset)}: no image has an alpha channel, so alpha_mask masks nothing")
    if subset.conditioning_data_dir is not None:
        return _with_masks(found, subset.conditioning_data_dir, problems)
    return found


def _transparent(found: list[_Found], subset: SubsetSettings) -> list[str]:
    """What to say of images with transparency that is not used as a mask."""
    names = [one.name for one in found if one.header.alpha]
    if not names or subset.alpha_mask:
        return []
    advice = "" if subset.conditioning_data_dir else "; alpha_mask would leave it out of the loss"
    return [
        f"{_source(subset)}: {len(names)} images have an alpha channel ({shown(names)}), what is transparent is laid "
        f"on white{advice}"
    ]


def _source(subset: SubsetSettings) -> Path:
    source = subset.metadata_file or subset.image_dir
    assert source is not None
    return source


def _from_folder(subset: SubsetSettings, problems: Problems, notices: list[str]) -> list[_Found]:
    assert subset.image_dir is not None
    listing = list_folder(subset.image_dir)
    notices += listing.notices
    if not listing.images:
        problems.add(listing.folder, " ".join(("holds no image", *(f"({n})" for n in listing.notices))))
        return []
    captions = read_captions(listing, subset, problems)
    notices += [*captions.notices, *_shared_stems(listing)]
    texts = captions.by_image
    if subset.cache_info:
        noted = scan(listing.folder, listing.images, read_info(listing.folder), problems)
        notice = write_info(listing.folder, [(name, one, texts[name]) for name, one in noted.items()])
        notices += [notice] if notice else []
        headers = {name: one.header for name, one in noted.items()}
    else:
        headers = read_headers(listing.folder, listing.images, problems)
    return [
        _Found(listing.folder, name, header, texts[name], texts[name]) for name, header in headers.items()
    ]


def _shared_stems(listing: Listing) -> list[str]:
    """A notice if images differ in their endings only, as a.png and a.jpg do."""
    by_stem: dict[str, list[str]] = {}
    for name in listing.images:
        by_stem.setdefault(stem_of(name), []).append(name)
    shared = [" and ".join(names) for names in by_stem.values() if len(names) > 1]
    if not shared:
        return []
    return [
        f"{listing.folder}: images that differ in their endings only share a caption; all of them are trained on: "
        f"{shown(shared)}"
    ]


def _from_metadata(subset: SubsetSettings, problems: Problems, notices: list[str]) -> list[_Found]:
    entries = read_metadata(subset, problems)
    if not entries:
        notices.append(f"metadata_file {subset.metadata_file} names no usable image")
    names: dict[Path, list[str]] = {}
    for entry in entries:
        names.setdefault(entry.path.parent, []).append(entry.path.name)
    headers = {folder: read_headers(folder, of_folder, problems) for folder, of_folder in names.items()}
    return [
        _Found(folder, name, headers[folder][name], entry.caption, entry.tags)
        for entry in entries
        if (name := entry.path.name) in headers[folder := entry.path.parent]
    ]


def _with_masks(found: list[_Found], folder: Path, problems: Problems) -> list[_Found]:
    """Give each image the mask of its stem; both must be of one size and neither may be without the other."""
    listing = list_folder(folder)
    masks = {stem_of(name): name for name in listing.images}
    headers = read_headers(folder, listing.images, problems)
    stems = [stem_of(one.name) for one in found]
    for stem in sorted(masks.keys() - set(stems)):
        problems.add(folder / masks[stem], "is a mask without an image")
    paired = []
    for one, stem in zip(found, stems, strict=True):
        mask = masks.get(stem)
        if mask is None:
            problems.add(one.path, f"has no mask in {folder}")
        elif mask in headers and headers[mask].size != one.header.size:
            problems.add(folder / mask, f"is {headers[mask].size} pixels but its image is {one.header.size}")
        else:
            paired.append(one._replace(mask=folder / mask))
    return paired


def _record(found: _Found, dataset: int, number: int, subset: SubsetSettings) -> ImageRecord:
    folder = str(found.folder)
    return ImageRecord(
        key=f"{dataset}/{os.path.basename(folder)}/{found.name}",
        file=os.path.join(folder, found.name),
        size=found.header.size,
        caption=found.caption,
        num_repeats=subset.num_repeats,
        dataset=dataset,
        subset=number,
        is_reg=subset.is_reg,
        orientation=found.header.orientation,
        mask_path=found.mask,
    )


def _large_enough(made: list[ImageRecord], dataset: DatasetSettings) -> list[ImageRecord]:
    """Without those of at most the area of skip_image_resolution.

    Applied after the split, so that datasets over one folder hold back the same images.
    """
    if dataset.skip_image_resolution is None:
        return made
    area = math.prod(dataset.skip_image_resolution)
    return [record for record in made if math.prod(record.size) > area]


def _skipped_notice(skipped: int, total: int, dataset: DatasetSettings, subset: SubsetSettings) -> str:
    assert dataset.skip_image_resolution is not None
    width, height = dataset.skip_image_resolution
    return (
        f"{_source(subset)}: {skipped} of {total} images are left out at resolution "
        f"{dataset.resolution[0]}x{dataset.resolution[1]}, having no more pixels than skip_image_resolution = "
        f"{width}x{height}"
    )


def _split(
    made: list[ImageRecord], subset: SubsetSettings, *, seed: int
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Training images and images held back: the two parts of one keyed shuffle, so none is in both.

    As many as in Kohya are trained on, ceil(n * (1 - split)); regularisation images are never held back. The
    shuffle does not know the dataset, so a folder used at two resolutions is split alike in both.
    """
    share = subset.validation_split
    if subset.is_reg or share <= 0:
        return made, []
    chosen = seed if subset.validation_seed is None else subset.validation_seed

    def order(record: ImageRecord) -> bytes:
        return randomness.digest(chosen, "validation split", record.path.parent.name, record.path.name)

    shuffled = sorted(made, key=order)
    count = math.ceil(len(made) * (1 - share) - 1e-9)
    kept = {record.file for record in shuffled[:count]}
    return [r for r in made if r.file in kept], [r for r in made if r.file not in kept]


def balance_regularisation(records: list[ImageRecord], notices: list[str]) -> list[ImageRecord]:
    """One dataset's records with regularisation images repeated, in turn, up to the number of training
    samples.

    Training images come first. Regularisation images beyond that number are left out, which is noted.
    """
    training = [record for record in records if not record.is_reg]
    regularisation = [record for record in records if record.is_reg]
    wanted = sum(record.num_repeats for record in training)
    repeats = [0] * len(regularisation)
    total = 0
    for number, record in enumerate(regularisation):
        if total >= wanted:
            break
        repeats[number] = record.num_repeats
        total += record.num_repeats
    if 0 < total < wanted:
        rounds, rest = divmod(wanted - total, len(regularisation))
        repeats = [count + rounds + (number < rest) for number, count in enumerate(repeats)]
    unused = repeats.count(0)
    if unused:
        notices.append(
            f"{unused} of {len(regularisation)} regularisation images are more than the training needs"
        )
    used = [
        record._replace(num_repeats=count)
        for record, count in zip(regularisation, repeats, strict=True)
        if count > 0
    ]
    return training + used


def _report(
    found: list[_Found],
    kept: list[ImageRecord],
    held: list[ImageRecord],
    dataset: int,
    number: int,
    subset: SubsetSettings,
) -> SubsetReport:
    return SubsetReport(
        dataset=dataset,
        subset=number,
        name=_source(subset).name,
        is_reg=subset.is_reg,
        num_repeats=subset.num_repeats,
        num_images=len(kept),
        num_validation=len(held),
        tags=tuple(one.tags for one in found),
    )


def _with_unique_names(
    training: list[ImageRecord], validation: list[ImageRecord]
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Tell apart records of equal key (folders of one name), and images of one stem in their cache names.

    Kohya's cache name goes to the first image of a stem in path order; the others keep their extension in it
    (`a.png` beside `a.jpg` caches as `a.png_...`).
    """
    paths = {record.file for records in (training, validation) for record in records}
    owners: dict[str, str] = {}
    for path in paths:
        stem = stem_of(path)
        owners[stem] = min(owners.get(stem, path), path)
    keys = {record.key for records in (training, validation) for record in records}
    if len(owners) == len(paths) and len(keys) == len(training) + len(validation):
        return training, validation
    seen: Counter[str] = Counter()

    def renamed(record: ImageRecord) -> ImageRecord:
        seen[record.key] += 1
        count = seen[record.key]
        path = record.file
        owner = owners[stem_of(path)] == path
        if count == 1 and owner:
            return record
        key = record.key if count == 1 else f"{record.key}#{count}"
        return record._replace(key=key, cache_name="" if owner else record.path.name)

    return [renamed(record) for record in training], [renamed(record) for record in validation]
