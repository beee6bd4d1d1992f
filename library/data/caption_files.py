"""Captions as they lie beside the images: which file belongs to which image, and what it says.

The text is returned raw; what the options make of it is `captions.py`. Differences from Kohya: a byte order
mark is dropped, the face-crop fall-back looks at the file name only, and a folder that has captions only as
`.txt` is read although another extension was asked for (and it is said). A folder with neither captions nor class
tokens is refused.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.config.dataset_settings import SubsetSettings
from library.data.scan import SHOWN, Listing, Problems

FALLBACK_EXTENSION = ".txt"
NO_FILES = ".none"  # caption_extension = "none": captions are the class tokens, whatever files there are


@dataclass(frozen=True, slots=True)
class Captions:
    """Raw captions by image, and what to tell about them."""

    by_image: Mapping[Path, str]
    notices: tuple[str, ...]


def read_captions(listing: Listing, settings: SubsetSettings, problems: Problems) -> Captions:
    """Captions of all images of a folder; `class_tokens` stand in where there is no file."""
    asked = settings.caption_extension
    extension = asked if asked.startswith(".") or not asked else f".{asked}"
    notices = []
    files = _caption_files(listing, extension)
    if not files and extension not in (FALLBACK_EXTENSION, NO_FILES):
        files = _caption_files(listing, FALLBACK_EXTENSION)
        if files:
            extension = FALLBACK_EXTENSION
            notices.append(
                f"{listing.folder} has no {asked} file but {len(files)} {extension} captions; those are "
                f"used, set caption_extension to {extension} to say so yourself"
            )
    found: dict[Path, str] = {}
    blank = []
    for image in listing.images:
        if image not in files:
            found[image] = settings.class_tokens or ""
            continue
        text = _read(files[image], problems, every_line=settings.enable_wildcard)
        found[image] = text
        if not text:
            blank.append(files[image])
    missing = [image for image in listing.images if image not in files]
    if not files and listing.images and not settings.class_tokens and settings.caption_dropout_rate < 1:
        # Kohya would train the whole folder on the empty caption, which is hardly ever meant.
        problems.add(
            listing.folder,
            f"has no {extension} captions and no class tokens: write captions beside the images, name the folder "
            f"{settings.num_repeats}_token, or set caption_dropout_rate = 1 to train without captions",
        )
    elif missing and extension != NO_FILES:
        notices.append(_missing_notice(missing, listing, settings, extension))
    if blank:
        notices.append(
            f"{_listed(blank)} in {listing.folder}: the caption is empty because the first line is blank"
        )
    return Captions(found, tuple(notices))


def _caption_files(listing: Listing, extension: str) -> dict[Path, Path]:
    """Image -> its caption file: of the same stem, or of the stem without a face-crop's four numbers."""
    files = {}
    for image in listing.images:
        stem = os.path.splitext(image.name)[0]
        parts = stem.split("_")
        candidates = [stem, *(["_".join(parts[:-4])] if len(parts) >= 5 else [])]
        for candidate in candidates:
            if candidate + extension in listing.names:
                files[image] = listing.folder / (candidate + extension)
                break
    return files


def _read(path: Path, problems: Problems, *, every_line: bool) -> str:
    """The first line, or all lines that are not blank; an empty or undecodable file is a problem."""
    try:
        with path.open(encoding="utf-8-sig") as file:
            lines = file.readlines()
    except UnicodeDecodeError as error:
        problems.add(path, f"is not UTF-8 text (byte {error.start}): save it as UTF-8")
        return ""
    except OSError as error:
        problems.add(path, f"cannot be read ({error.strerror})")
        return ""
    if not lines:
        problems.add(path, "is empty (write a caption or delete the file)")
        return ""
    if every_line:
        return "\n".join(line.strip() for line in lines if line.strip())
    return lines[0].strip()


def _missing_notice(
    missing: Sequence[Path], listing: Listing, settings: SubsetSettings, extension: str
) -> str:
    what = f'"{settings.class_tokens}"' if settings.class_tokens else "an empty caption"
    of_all = f"{len(missing)} of {len(listing.images)} images"
    return f"{of_all} in {listing.folder} have no {extension} file and train with {what}: {_listed(missing)}"


def _listed(paths: Sequence[Path]) -> str:
    names = ", ".join(path.name for path in paths[:SHOWN])
    return names + (f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else "")
