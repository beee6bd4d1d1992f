"""All that a report shows, put together from the run log, the pictures on disk and what was known at the start."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from library.config.prompts import SamplePrompt
from library.report.curves import charts
from library.report.history import (
    Checkpoints,
    last_outliers,
    notices,
    of_kind,
    standing,
    time_split,
)
from library.report.pictures import SampleFile, Shelf, sample_files
from library.train.run_log import Line, Outliers, Sampled, Started, Stepped, Validated
from library.train.spent import Spent

Json = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """What does not change while a run goes on. A report of a log alone has less of it."""

    name: str
    folder: Path  # output_dir
    output_name: str | None
    options: Sequence[Mapping[str, object]] = ()
    notices: Sequence[str] = ()
    secrets: Sequence[str] = ()  # words that nothing may show
    prompts: Mapping[int, Json] = field(default_factory=dict)  # text and details by index
    data: Json | None = None
    outliers: Callable[[Outliers], Json] | None = None
    memory: Callable[[], Sequence[Json]] = tuple  # bytes by what holds them
    sheets: Sequence[Json] = ()
    since: float | None = None  # unix seconds of the first start; None is the log's


class Composer:
    """Puts a report together, again and again while a run goes on: pictures are read and files hashed once."""

    def __init__(self, known: Known) -> None:
        self._known = known
        self._shelf, self._checkpoints = Shelf(), Checkpoints()

    @property
    def name(self) -> str:
        """Of the run."""
        return self._known.name

    def content(self, lines: Sequence[Line]) -> Json:
        """The page's content."""
        known = self._known
        outliers, spent = last_outliers(lines), Spent(lines)
        return {
            "run": {"name": known.name, **standing(lines, secrets=known.secrets)},
            "notices": notices(lines, known.notices, secrets=known.secrets),
            "charts": charts(of_kind(lines, Stepped), of_kind(lines, Validated)),
            "time": time_split(spent),
            "time_advice": spent.advice(),
            "memory": list(known.memory()),
            "samples": self._samples(lines),
            "sheets": list(known.sheets),
            "checkpoints": self._checkpoints.table(lines, known.folder),
            "outliers": known.outliers(outliers) if outliers and known.outliers else None,
            "data": known.data,
            "options": list(known.options) or _given(lines),
        }

    def _samples(self, lines: Sequence[Line]) -> Json | None:
        known, starts = self._known, of_kind(lines, Started)
        if not starts:
            return None
        files = sample_files(
            known.folder / "sample",
            known.output_name,
            steps_per_epoch=starts[-1].steps_per_epoch,
            total_steps=starts[-1].total_steps,
            since=lines[0].time if known.since is None else known.since,
        )
        return self._gallery(files, known.prompts or _logged_prompts(lines))

    def _gallery(self, files: Sequence[SampleFile], prompts: Mapping[int, Json]) -> Json:
        thumbs = self._shelf.fill(files)
        indices = sorted({sample.prompt for sample in thumbs})
        return {
            "prompts": [
                {"index": index, **prompts.get(index, {"text": f"prompt {index}"})} for index in indices
            ],
            "steps": sorted({sample.step for sample in thumbs}),
            "pictures": [
                {
                    "prompt": sample.prompt,
                    "step": sample.step,
                    "file": f"sample/{sample.path.name}",
                    **asdict(made),
                }
                for sample, made in thumbs.items()
            ],
            "left_out": len(files) - len(thumbs),
        }


def prompts_content(prompts: Sequence[SamplePrompt]) -> dict[int, Json]:
    """Text and details of the sample prompts by index."""
    return {prompt.index: {"text": prompt.prompt, "details": details(prompt)} for prompt in prompts}


def details(prompt: SamplePrompt) -> str:
    """What a prompt asks for beside its words."""
    parts = [
        f"{prompt.width}x{prompt.height}",
        f"{prompt.sample_steps} steps",
        f"guidance {prompt.guidance_scale:g}",
        *([f"scale {prompt.scale:g}"] if prompt.scale != 1 else []),
        *([f"strength {prompt.strength:g}"] if prompt.strength != 1 else []),
        *([f"seed {prompt.seed}"] if prompt.seed is not None else []),
        *([f"not: {prompt.negative_prompt}"] if prompt.negative_prompt and prompt.scale != 1 else []),
    ]
    return " · ".join(parts)


def _given(lines: Sequence[Line]) -> list[Json]:
    """The options that the log holds; it knows no sources."""
    starts = of_kind(lines, Started)
    options = starts[-1].options if starts else {}
    return [
        {"section": "given", "name": name, "value": str(value), "source": "run log", "state": "used", "effect": ""}
        for name, value in options.items()
    ]  # fmt: skip


def _logged_prompts(lines: Sequence[Line]) -> dict[int, Json]:
    return {one.prompt_number: {"text": one.prompt} for one in of_kind(lines, Sampled)}
