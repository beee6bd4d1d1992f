"""What a caching pass still has to do: every file looked at once, divided over ranks, before any encoder is
loaded.

Files are dealt by their place in the sorted list, all entries of a file to one rank, so no two ranks write
one file. A folder that cannot be written gets its missing entries in memory, on every rank. No collective is
called here.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from library.cache import latents, text
from library.cache.latents import Entry, LatentNeed
from library.cache.text import TextNeed, TextOptions
from library.errors import ConfigError, DatasetError

NeedT = TypeVar("NeedT", LatentNeed, TextNeed)
LATENTS, TEXTS = "latents", "text encoder outputs"  # names of the two caches
_NOTICES = {
    Entry.FOREIGN: "{count} cached {what} are another program's and are used, since their shapes fit",
    Entry.STALE: "{count} cached {what} fit no longer (image, caption, encoder or options) and are made anew",
    Entry.UNREADABLE: "{count} cached {what} are in damaged files, such as {path}, and are made anew",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheOptions:
    """How a pass runs."""

    rank: int = 0
    world: int = 1
    batch_size: int = 1  # vae_batch_size or text_encoder_batch_size
    to_disk: bool = True  # off: everything in memory, on every rank
    skip_check: bool = False  # skip_cache_check: arrays in place are enough
    progress: Callable[[int, int], None] | None = None  # called with (done, of how many) on this rank


@dataclass(frozen=True, slots=True)
class Work(Generic[NeedT]):
    """What this rank has to encode."""

    to_write: tuple[NeedT, ...]
    to_keep: tuple[NeedT, ...]  # in memory
    num_checked: int
    notices: tuple[str, ...]


def survey_latents(needs: Sequence[LatentNeed], *, encoder: str, options: CacheOptions) -> Work[LatentNeed]:
    """Which latents this rank makes. `encoder` names the autoencoder and its precision."""

    def check(of_file: list[LatentNeed]) -> list[Entry]:
        return latents.check_file(of_file, encoder=encoder, skip_check=options.skip_check)

    return _survey(LATENTS, needs, check, options)


def survey_text(
    needs: Sequence[TextNeed], *, text_options: TextOptions, options: CacheOptions
) -> Work[TextNeed]:
    """Which captions' outputs this rank makes."""

    def check(of_file: list[TextNeed]) -> list[Entry]:
        return [text.check_file(one, options=text_options, skip_check=options.skip_check) for one in of_file]

    return _survey(TEXTS, needs, check, options)


def _survey(
    what: str, needs: Sequence[NeedT], check: Callable[[list[NeedT]], list[Entry]], options: CacheOptions
) -> Work[NeedT]:
    if not options.to_disk:
        return Work((), tuple(needs), len(needs), ())
    files: dict[Path, list[NeedT]] = {}
    for need in needs:
        files.setdefault(need.path, []).append(need)
    paths = sorted(files, key=str)
    mine = set(paths[options.rank :: options.world])
    writable = {folder: can_write(folder) for folder in {path.parent for path in paths}}
    looked_at = [path for path in paths if path in mine or not writable[path.parent]]
    with ThreadPoolExecutor(max_workers=min(16, 4 * (os.cpu_count() or 1))) as pool:
        states = list(pool.map(lambda path: check(files[path]), looked_at))
    found: list[tuple[NeedT, Entry]] = [
        (need, state)
        for path, of_file in zip(looked_at, states, strict=True)
        for need, state in zip(files[path], of_file, strict=True)
    ]
    missing = [need for need, state in found if not state.usable]
    to_write = tuple(need for need in missing if writable[need.path.parent])
    to_keep = tuple(need for need in missing if not writable[need.path.parent])
    read_only: list[Path] = sorted({need.path.parent for need in to_keep}, key=str)
    return Work(
        to_write,
        to_keep,
        len(found),
        (*_state_notices(what, found), *(_read_only_notice(folder) for folder in read_only)),
    )


def can_write(folder: Path) -> bool:
    """Whether a file can be made in a folder; tried, as permissions say nothing of read-only disks."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return True
    except OSError:
        return False


def check_space(files: Iterable[tuple[Path, int]], option: str) -> None:
    """Raise DatasetError where `files`, given with the bytes they will have, do not fit on a disk. `option` is
    what makes them smaller.
    """
    needed: Counter[int] = Counter()
    folders: dict[int, Path] = {}
    for path, size in files:
        disk = path.parent.stat().st_dev
        needed[disk] += size - (path.stat().st_size if path.exists() else 0)
        folders[disk] = path.parent
    for disk, folder in folders.items():
        free = shutil.disk_usage(folder).free
        if needed[disk] > free:
            raise DatasetError(
                f"the caches need about {needed[disk] / 1e6:.0f} MB, but the disk of {folder} has "
                f"{free / 1e6:.0f} MB left: free space, lower {option}, or cache in memory"
            )


def check_memory(size: int, option: str) -> None:
    """Raise ConfigError if so many bytes are more than the machine has, where that can be known. `option` is what
    makes them fewer.
    """
    if not hasattr(os, "sysconf"):
        return
    present = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > present:
        raise ConfigError(
            f"the caches need about {size / 1e6:.0f} MB of memory, but this machine has {present / 1e6:.0f} MB: "
            f"lower {option}, or cache on disk"
        )


def _state_notices(what: str, found: Iterable[tuple[NeedT, Entry]]) -> list[str]:
    listed = list(found)
    counts = Counter(state for _, state in listed)
    examples = {state: need.path for need, state in listed}
    return [
        sentence.format(count=counts[state], what=what, path=examples[state])
        for state, sentence in _NOTICES.items()
        if counts[state]
    ]


def _read_only_notice(folder: Path) -> str:
    return (
        f"{folder} cannot be written; what its cache lacks is kept in memory and made again in the next run"
    )
