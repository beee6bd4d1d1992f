"""What a report shows of the data: the plan in words, folders, buckets with some of their pictures as trained on."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import asdict

from library.data.buckets import Size
from library.data.dataset import TrainingData
from library.data.inspection import example, first_caption
from library.errors import UserError
from library.preflight.facts import BucketFacts, Forecast
from library.preflight.rows import plan_rows, schedule_rows
from library.report.pictures import Thumb, thumb
from library.train.contact_sheets import as_picture
from library.train.run_log import Outliers

logger = logging.getLogger(__name__)

Json = dict[str, object]
SIDE, QUALITY = 224, 70  # of a copy
MOST_PICTURES = 120  # in a report
MOST_OF_A_BUCKET = 12
MOST_OUTLIERS = 20


def data_content(facts: Forecast, data: TrainingData) -> Json:
    """The section on data. Reads up to MOST_PICTURES pictures."""
    members: dict[tuple[int, Size], list[int]] = defaultdict(list)
    for number, (record, place) in enumerate(zip(data.records, data.placements, strict=True)):
        members[(record.dataset + 1, place.bucket)].append(number)
    each = min(MOST_OF_A_BUCKET, max(1, MOST_PICTURES // max(1, len(facts.buckets))))
    return {
        "plan": [*plan_rows(facts), *schedule_rows(facts)],
        "folders": [asdict(folder) for folder in facts.folders],
        "buckets": [
            _bucket(bucket, data, members[(bucket.dataset, bucket.size)][: each if n < MOST_PICTURES else 0])
            for n, bucket in enumerate(facts.buckets)
        ],
    }


def outliers_content(outliers: Outliers, data: TrainingData | None) -> Json:
    """The pictures that stand out, with copies and captions where the data is at hand."""
    at = {record.key: number for number, record in enumerate(data.records)} if data is not None else {}
    rows = []
    for one in outliers.images[:MOST_OUTLIERS]:
        shown = _picture(data, at[one.image]) if data is not None and one.image in at else {}
        rows.append({**shown, **asdict(one)})
    return {"epoch": outliers.epoch, "images": rows}


def _bucket(bucket: BucketFacts, data: TrainingData, members: list[int]) -> Mapping[str, object]:
    shown = (_picture(data, number) for number in members)
    return {**asdict(bucket), "pictures": [one for one in shown if one]}


def _picture(data: TrainingData, number: int) -> Json:
    """One picture as the model gets it, and its caption; empty when it cannot be read."""
    record = data.records[number]
    try:
        made: Thumb = thumb(as_picture(example(data, number)), side=SIDE, quality=QUALITY)
    except (UserError, OSError) as error:
        logger.debug("%s is left out of the report: %s", record.path, error)
        return {}
    return {**asdict(made), "name": record.path.name, "caption": first_caption(data, record)}
