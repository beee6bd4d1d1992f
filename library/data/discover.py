"""From resolved datasets to image records: what is trained on, how often, with which caption, and what is
held back.

Every problem of every folder is gathered and raised as one DatasetError. Nothing is dropped in silence: what
Kohya leaves out or fills in is listed in the notices. Pixels are not decoded and nothing depends on rank;
records come out in the same order everywhere.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from library import randomness
from library.config.dataset_settings import DatasetSettings, SubsetSettings
from library.data.caption_files import read_captions
from library.data.images import Header
from library.data.metadata_files import read_metadata
from library.data.records import ImageRecord
from library.data.scan import Listing, Problems, list_folder, read_headers, read_info, write_info
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
    tag_frequency: Mapping[str, int]  # tag -> captions it occurs in, times it occurs there


@dataclass(frozen=True, slots=True)
class Discovered:
    """All records: training images with their repeats, and the images held back."""

    records: tuple[ImageRecord, ...]
    validation: tuple[ImageRecord, ...]
    subsets: tuple[SubsetReport, ...]
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _Found:
    """One image of a subset before it becomes a record."""

    path: Path
    header: Header
    caption: str
    tags: str
    mask: Path | None = None


def discover(datasets: Sequence[DatasetSettings], *, seed: int) -> Discovered:
    """Read all folders and metadata files. `seed` splits off validation images where no validation_seed is
    set.

    Raises DatasetError naming the first five problems, or saying that there is no image at all.
    """
    problems = Problems()
    notices: list[str] = []
    records: list[ImageRecord] = []
    validation: list[ImageRecord] = []
    reports: list[SubsetReport] = []
    for index, dataset in enumerate(datasets):
        of_dataset: list[ImageRecord] = []
        for number, subset in enumerate(dataset.subsets):
            found = _read_subset(subset, problems, notices)
            made = [_record(one, index, number, subset) for one in found]
            kept, held = _split(made, subset, seed=seed)
            of_dataset += kept
            validation += [replace(record, num_repeats=1) for record in held]
            reports.append(_report(found, kept, held, index, number, subset))
        records += balance_regularisation(of_dataset, notices)
    problems.check()
    if not records:
        raise DatasetError(
            "there is no training image; check the image folders, num_repeats and validation_split"
        )
    training, held_back = _with_unique_names([*records], [*validation])
    return Discovered(tuple(training), tuple(held_back), tuple(reports), tuple(notices))


def tag_frequency(discovered: Discovered) -> dict[str, dict[str, int]]:
    """Kohya's ss_tag_frequency: tags counted by folder name over all subsets of that name."""
    totals: dict[str, Counter[str]] = defaultdict(Counter)
    for report in discovered.subsets:
        totals[report.name].update(report.tag_frequency)
    return {name: dict(counts) for name, counts in totals.items()}


def _read_subset(subset: SubsetSettings, problems: Problems, notices: list[str]) -> list[_Found]:
    found = (_from_metadata if subset.metadata_file else _from_folder)(subset, problems, notices)
    if subset.conditioning_data_dir is not None:
        return _with_masks(found, subset.conditioning_data_dir, problems)
    return found


def _from_folder(subset: SubsetSettings, problems: Problems, notices: list[str]) -> list[_Found]:
    assert subset.image_dir is not None
    listing = list_folder(subset.image_dir)
    if listing.overlooked:
        names = ", ".join(listing.overlooked)
        notices.append(
            f"{listing.folder}: extensions must be in lower or in upper case, so {names} are left out"
        )
    if not listing.images:
        problems.add(listing.folder, "holds no image")
        return []
    captions = read_captions(listing, subset, problems)
    notices += captions.notices
    headers = _headers(listing, subset, problems)
    found = [
        _Found(path, headers[path], captions.by_image[path], captions.by_image[path])
        for path in listing.images
        if path in headers
    ]
    if subset.cache_info:
        notice = write_info(listing.folder, [(one.path, one.header, one.caption) for one in found])
        notices += [notice] if notice else []
    return found


def _headers(listing: Listing, subset: SubsetSettings, problems: Problems) -> dict[Path, Header]:
    known = read_info(listing.folder) if subset.cache_info else None
    return read_headers(listing.images, problems, known=known)


def _from_metadata(subset: SubsetSettings, problems: Problems, notices: list[str]) -> list[_Found]:
    entries = read_metadata(subset, problems)
    if not entries:
        notices.append(f"metadata_file {subset.metadata_file} names no usable image")
    headers = read_headers([entry.path for entry in entries], problems)
    return [
        _Found(entry.path, headers[entry.path], entry.caption, entry.tags)
        for entry in entries
        if entry.path in headers
    ]


def _with_masks(found: list[_Found], folder: Path, problems: Problems) -> list[_Found]:
    """Give each image the mask of its stem; both must be of one size and neither may be without the other."""
    listing = list_folder(folder)
    masks = {path.stem: path for path in listing.images}
    headers = read_headers(listing.images, problems)
    for stem in sorted(masks.keys() - {one.path.stem for one in found}):
        problems.add(masks[stem], "is a mask without an image")
    paired = []
    for one in found:
        mask = masks.get(one.path.stem)
        if mask is None:
            problems.add(one.path, f"has no mask in {folder}")
        elif mask in headers and headers[mask].size != one.header.size:
            problems.add(mask, f"is {headers[mask].size} pixels but its image is {one.header.size}")
        else:
            paired.append(replace(one, mask=mask))
    return paired


def _record(found: _Found, dataset: int, number: int, subset: SubsetSettings) -> ImageRecord:
    return ImageRecord(
        key=f"{dataset}/{found.path.parent.name}/{found.path.name}",
        path=found.path,
        size=found.header.size,
        caption=found.caption,
        num_repeats=subset.num_repeats,
        dataset=dataset,
        subset=number,
        is_reg=subset.is_reg,
        orientation=found.header.orientation,
        mask_path=found.mask,
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
    kept = {record.path for record in shuffled[:count]}
    return [r for r in made if r.path in kept], [r for r in made if r.path not in kept]


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
        replace(record, num_repeats=count)
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
    tags = Counter(tag for one in found for part in one.tags.split(",") if (tag := part.strip().lower()))
    source = subset.metadata_file or subset.image_dir
    assert source is not None
    return SubsetReport(
        dataset, number, source.name, subset.is_reg, subset.num_repeats, len(kept), len(held), dict(tags)
    )


def _with_unique_names(
    training: list[ImageRecord], validation: list[ImageRecord]
) -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Tell apart records of equal key (folders of one name), and images of one stem in their cache names.

    Kohya's cache name goes to the first image of a stem in path order; the others keep their extension in it
    (`a.png` beside `a.jpg` caches as `a.png_...`).
    """
    owners: dict[Path, Path] = {}
    for path in sorted({record.path for record in training + validation}, key=str):
        owners.setdefault(path.with_suffix(""), path)
    seen: Counter[str] = Counter()

    def renamed(record: ImageRecord) -> ImageRecord:
        seen[record.key] += 1
        count = seen[record.key]
        key = record.key if count == 1 else f"{record.key}#{count}"
        name = "" if owners[record.path.with_suffix("")] == record.path else record.path.name
        return replace(record, key=key, cache_name=name)

    return [renamed(record) for record in training], [renamed(record) for record in validation]
