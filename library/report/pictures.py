"""Pictures inside a page: small copies as data URIs, and a shelf of sample pictures that keeps to a budget."""

from __future__ import annotations

import base64
import io
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from PIL import Image, UnidentifiedImageError

logger = logging.getLogger(__name__)

# Longer side in pixels and WebP quality, from good to small.
LEVELS = ((512, 80), (512, 55), (384, 70), (256, 70))
BUDGET = 10_000_000  # letters that the samples of a page may take


@dataclass(frozen=True, slots=True)
class Thumb:
    """A small copy of a picture."""

    src: str  # data URI
    width: int  # pixels of the copy
    height: int


def thumb(image: Image.Image, *, side: int, quality: int) -> Thumb:
    """`image` with its longer side at most `side` pixels."""
    small = image.convert("RGB")
    small.thumbnail((side, side))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=quality, method=3)
    return Thumb(f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}", *small.size)


@dataclass(frozen=True, slots=True)
class SampleFile:
    """One sample picture on disk."""

    path: Path
    prompt: int  # index in the prompt file
    step: int


def sample_files(
    folder: Path, output_name: str | None, *, steps_per_epoch: int, total_steps: int, since: float
) -> list[SampleFile]:
    """The pictures of a run in `folder`, by their names; of several of one prompt and step the newest.

    `since` is when the run began (unix seconds); older ones are another run's.
    """
    prefix = re.escape(f"{output_name}_") if output_name else ""
    pattern = re.compile(rf"{prefix}(e?)(\d{{6,}})_(\d{{2,}})_(\d{{14}})(_\d+)?\.png")
    found: dict[tuple[int, int], tuple[str, SampleFile]] = {}
    for path in sorted(folder.glob("*.png")) if folder.is_dir() else ():
        match = pattern.fullmatch(path.name)
        if match is None or _seconds(match[4]) < int(since):
            continue
        step = min(int(match[2]) * steps_per_epoch, total_steps) if match[1] else int(match[2])
        sample = SampleFile(path, int(match[3]), step)
        place = (sample.prompt, step)
        if place not in found or found[place][0] <= match[4]:
            found[place] = (match[4], sample)
    return sorted((sample for _, sample in found.values()), key=lambda one: (one.step, one.prompt))


class Shelf:
    """Small copies of sample pictures, made once each, as good as the budget allows."""

    def __init__(self, budget: int = BUDGET) -> None:
        self._budget = budget
        self._level = 0
        self._made: dict[tuple[Path, int], Thumb] = {}

    def fill(self, samples: Sequence[SampleFile]) -> dict[SampleFile, Thumb]:
        """Copies of `samples`; where even small ones are too many, steps in the middle are left out."""
        while True:
            thumbs = {sample: made for sample in samples if (made := self._copy(sample.path)) is not None}
            if self._fits(thumbs) or self._level == len(LEVELS) - 1:
                break
            self._level += 1
            self._made.clear()
        while not self._fits(thumbs) and len({sample.step for sample in thumbs}) > 2:
            kept = _thinned(sorted({sample.step for sample in thumbs}))
            thumbs = {sample: made for sample, made in thumbs.items() if sample.step in kept}
        return thumbs

    def _fits(self, thumbs: dict[SampleFile, Thumb]) -> bool:
        return sum(len(made.src) for made in thumbs.values()) <= self._budget

    def _copy(self, path: Path) -> Thumb | None:
        try:
            key = (path, path.stat().st_mtime_ns)
            if key not in self._made:
                side, quality = LEVELS[self._level]
                with Image.open(path) as image:
                    self._made[key] = thumb(image, side=side, quality=quality)
        except (OSError, UnidentifiedImageError, ValueError) as error:
            logger.debug("%s is left out of the report: %s", path, error)
            return None
        return self._made[key]


def _thinned(steps: Sequence[int]) -> set[int]:
    """Every other step, the first and the last among them."""
    return {*steps[::2], steps[-1]}


def _seconds(stamp: str) -> float:
    try:
        return datetime.strptime(stamp, "%Y%m%d%H%M%S").timestamp()
    except ValueError:
        return 0.0
