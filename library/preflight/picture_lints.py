"""Advice on pictures: cropped, enlarged, copied, too few for their bucket."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

from library.files.hashes import file_sha256
from library.preflight.evidence import Evidence
from library.preflight.words import count_text, names_text

MOST_COMPARED = 5000  # pictures; reading sizes and contents of more takes too long for a dry run
VISIBLE_CROP = 0.02  # share of a picture below which cropping is rounding


def pictures_stay_whole(evidence: Evidence) -> None:
    """Without buckets everything is cropped to one shape."""
    data, losses = evidence.data.training, []
    for record, placement in zip(data.records, data.placements, strict=True):
        area = placement.resized[0] * placement.resized[1]
        lost = 1 - placement.bucket[0] * placement.bucket[1] / area
        if not data.datasets[record.dataset].enable_bucket and lost > VISIBLE_CROP:
            losses.append(lost)
    if losses:
        evidence.context.advise(
            "images-cropped",
            f"enable_bucket is off: {len(losses)} of {len(data.records)} images are cropped to the shape of "
            f"resolution and lose {sum(losses) / len(losses):.0%} of their area on average, at most "
            f"{max(losses):.0%}; recommended: enable_bucket = true",
        )


def pictures_are_large_enough(evidence: Evidence) -> None:
    """Enlarged pictures are blurred."""
    enlarged = sum(bucket.enlarged for bucket in evidence.forecast.buckets)
    if enlarged:
        evidence.context.advise(
            "images-enlarged",
            f"{enlarged} of {evidence.forecast.plan.images} images are enlarged more than 1.5 times to fill their "
            "bucket, and blurred by it; recommended: larger images, a lower resolution, or bucket_no_upscale = true",
        )


def pictures_differ(evidence: Evidence) -> None:
    """Files of one size are compared by content."""
    files = {record.file for record in evidence.data.training.records}
    if len(files) > MOST_COMPARED:
        return
    by_size: dict[int, list[Path]] = defaultdict(list)
    for path in map(Path, sorted(files)):
        by_size[path.stat().st_size].append(path)
    by_content: dict[str, list[Path]] = defaultdict(list)
    for same_size in by_size.values():
        for path in same_size if len(same_size) > 1 else ():
            by_content[file_sha256(path)].append(path)
    pairs = [
        " = ".join(f"{path.parent.name}/{path.name}" for path in copies[:2])
        for copies in by_content.values()
        if len(copies) > 1
    ]
    if pairs:
        evidence.context.advise(
            "images-identical",
            f"{count_text(len(pairs), 'image is', 'images are')} there more than once ({names_text(pairs)}); "
            "recommended: remove the copies, which are learnt as often as they are there",
        )


def buckets_fill_batches(evidence: Evidence) -> None:
    """A bucket with fewer samples than a batch never fills one."""
    plan = evidence.forecast.plan
    small = [b for b in evidence.forecast.buckets if b.samples < plan.batch_sizes[b.dataset - 1]]
    if small and len(evidence.forecast.buckets) > 1:
        names = [f"{b.size[0]}x{b.size[1]}: {b.samples}" for b in small]
        evidence.context.advise(
            "buckets-small",
            f"samples of {len(small)} of {len(evidence.forecast.buckets)} buckets do not fill one batch of "
            f"train_batch_size ({names_text(names)}); recommended: a larger bucket_reso_steps or a smaller "
            "train_batch_size",
        )


PICTURE_LINTS = (pictures_stay_whole, pictures_are_large_enough, pictures_differ, buckets_fill_batches)
