"""Metadata files (`in_json`, `metadata_file`): JSON or JSON lines that name images and carry captions and
tags.

Sizes are read from the images, never taken from the file: an edited picture would get the wrong bucket
without notice. Images that exist only as cache files, which Kohya can train on, are not supported.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from library.config.dataset_settings import SubsetSettings
from library.data import formats
from library.data.problems import Problems
from library.errors import DatasetError


@dataclass(frozen=True, slots=True)
class MetadataEntry:
    """One image of a metadata file."""

    path: Path
    caption: str  # raw caption with the tags appended
    tags: str


def read_metadata(settings: SubsetSettings, problems: Problems) -> tuple[MetadataEntry, ...]:
    """All entries, longest names first as in Kohya. Raises DatasetError for an unusable file."""
    assert settings.metadata_file is not None
    file = settings.metadata_file
    table = _load(file)
    extensions = sorted({one for suffix in formats.readable() for one in (suffix, suffix.upper())})
    entries = []
    for name in sorted(table, key=len, reverse=True):
        fields = table[name]
        path = _locate(name, settings.image_dir, extensions)
        if path is None:
            problems.add(Path(name), f"is named in {file} but not found under {settings.image_dir}")
            continue
        tags = str(fields.get("tags") or "")
        caption = _assemble(str(fields.get("caption") or ""), tags, settings)
        entries.append(MetadataEntry(path, caption, tags))
    return tuple(entries)


def _load(file: Path) -> dict[str, Mapping[str, object]]:
    try:
        text = file.read_text(encoding="utf-8-sig")
        if file.suffix.lower() == ".jsonl":
            lines = [json.loads(line) for line in text.split("\n") if line.strip()]
            table = {str(entry["image_path"]): entry for entry in lines}
        else:
            table = json.loads(text)
    except OSError as error:
        raise DatasetError(
            f"metadata_file {file} cannot be read ({error.strerror}); correct the path"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise DatasetError(
            f"metadata_file {file} is not JSON of the kind expected ({error}); correct it"
        ) from error
    if not isinstance(table, dict) or not all(isinstance(entry, dict) for entry in table.values()):
        raise DatasetError(
            f"metadata_file {file} must hold an object of objects keyed by image path; correct it"
        )
    return table


def _locate(name: str, image_dir: Path | None, extensions: Iterable[str]) -> Path | None:
    """The image file; a name without an image extension stands for the first file of that stem."""
    if image_dir is None and not Path(name).is_absolute():
        raise DatasetError(f"the metadata names {name} by a relative path, which needs image_dir; set it")
    path = (image_dir or Path()) / name
    if path.is_file():
        return path
    return next(
        (found for suffix in extensions if (found := path.with_name(path.name + suffix)).is_file()), None
    )


def _assemble(caption: str, tags: str, settings: SubsetSettings) -> str:
    """Caption and tags as one text; with wildcards the tags follow every line that is not blank."""
    separator = settings.caption_separator
    if not settings.enable_wildcard:
        text = separator.join(part for part in (caption, tags) if part)
        return text.split("\n", 1)[0].strip()
    lines = [line.strip() for line in caption.split("\n") if line.strip()]
    if not tags:
        return "\n".join(lines)
    joined = tags.replace("\n", separator)
    return "\n".join(f"{line}{separator}{joined}" for line in lines) or joined
