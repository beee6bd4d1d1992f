"""Captions as they lie beside the images: which file belongs to which image, and what it says.

The text is returned raw; what the options make of it is `captions.py`. Differences from Kohya: a byte order
mark is dropped, the face-crop fall-back looks at the file name only, and a folder that has captions only as
`.txt` is read although another extension was asked for (and it is said). A folder with neither captions nor class
tokens is refused.
"""

from __future__ import annotations

import codecs
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from library.config.dataset_settings import SubsetSettings
from library.data.formats import stem_of
from library.data.problems import Problems, shown
from library.data.scan import Listing, in_threads

FALLBACK_EXTENSION = ".txt"
NO_FILES = ".none"  # caption_extension = "none": captions are the class tokens, whatever files there are
_ONE_READ = 1 << 16  # bytes
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)


@dataclass(frozen=True, slots=True)
class Captions:
    """Raw captions by image name, and what to tell about them."""

    by_image: Mapping[str, str]
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
    texts = _read_all(listing, sorted(set(files.values())), problems, every_line=settings.enable_wildcard)
    stand_in = settings.class_tokens or ""
    found = {image: (texts[files[image]] or "") if image in files else stand_in for image in listing.images}
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
    blank = [name for name, text in texts.items() if text == ""]
    if blank:
        notices.append(
            f"{shown(blank)} in {listing.folder}: the caption is empty because the first line is blank"
        )
    return Captions(found, tuple(notices))


def _caption_files(listing: Listing, extension: str) -> dict[str, str]:
    """Image -> its caption file: of the same stem, or of the stem without a face-crop's four numbers."""
    files = {}
    for image in listing.images:
        stem = stem_of(image)
        name = stem + extension
        if name not in listing.names and stem.count("_") >= 4:
            name = stem.rsplit("_", 4)[0] + extension
        if name in listing.names:
            files[image] = name
    return files


def _read_all(
    listing: Listing, names: Sequence[str], problems: Problems, *, every_line: bool
) -> dict[str, str | None]:
    """Captions by file name, None where something is wrong with the file."""
    place = os.path.join(listing.folder, "")
    read = in_threads(lambda name: _read(place + name, every_line=every_line), names)
    for name, (_, problem) in zip(names, read, strict=True):
        if problem:
            problems.add(listing.folder / name, problem)
    return {name: None if problem else text for name, (text, problem) in zip(names, read, strict=True)}


def _read(path: str, *, every_line: bool) -> tuple[str, str]:
    """The first line, or all lines that are not blank, and what is wrong with the file: being empty or not
    UTF-8.
    """
    try:
        text = _content(path).removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError as error:
        return "", f"is not UTF-8 text (byte {error.start}): save it as UTF-8"
    except OSError as error:
        return "", f"cannot be read ({error.strerror})"
    if not text:
        return "", "is empty (write a caption or delete the file)"
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if every_line:
        return "\n".join(line.strip() for line in text.split("\n") if line.strip()), ""
    return text.split("\n", 1)[0].strip(), ""


def _content(path: str) -> bytes:
    """All of a file. Nearly every caption fits into one read, which takes half the time of `open`."""
    descriptor = os.open(path, _READ)
    try:
        data = os.read(descriptor, _ONE_READ)
        while len(data) >= _ONE_READ and (more := os.read(descriptor, _ONE_READ)):
            data += more
    finally:
        os.close(descriptor)
    return data


def _missing_notice(
    missing: Sequence[str], listing: Listing, settings: SubsetSettings, extension: str
) -> str:
    what = f'"{settings.class_tokens}"' if settings.class_tokens else "an empty caption"
    of_all = f"{len(missing)} of {len(listing.images)} images"
    return f"{of_all} in {listing.folder} have no {extension} file and train with {what}: {shown(missing)}"
