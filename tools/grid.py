"""Draw a contact sheet: every LoRA file (columns) at every strength (rows), for every prompt and seed.

    python tools/grid.py output/*.safetensors --strengths 0.6 0.8 1.0 --seeds 1 2 \\
        --config_file train.toml --output sheet.png --html sheet.html

Files may be ours, Kohya's or LyCORIS's, of any ranks. All other options are those of the trainer, on the command line
or in --config_file: models (pretrained_model_name_or_path, ae, clip_l, t5xxl), precision (mixed_precision, fp8_base)
and prompts (sample_prompts). --report puts the sheet into the report of a run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from PIL.Image import Image

from library.config.load import read_options
from library.config.notices import Notices
from library.config.prompts import SamplePrompt, load_prompts
from library.config.train_config import TrainConfig
from library.errors import ConfigError, TrainerError
from library.files.atomic import replacing, write_text
from library.files.refusals import refusals_named
from library.report.content import details
from library.report.page import content_of, render
from library.report.paths import is_report
from library.report.sheets import Sheet, draw_sheets, sheet_content
from library.train.trial import draw_all


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="+", type=Path, help="adapter files")
    parser.add_argument(
        "--strengths", nargs="+", type=float, default=[0.6, 0.8, 1.0], help="0 is the base model"
    )
    parser.add_argument("--seeds", nargs="+", type=int, help="draw each prompt with each of them")
    parser.add_argument("--output", type=Path, default=Path("grid.png"), help="picture to write (grid.png)")
    parser.add_argument("--html", type=Path, help="page to write as well")
    parser.add_argument("--report", type=Path, help="report of a run to put the sheet into")
    given, trainer = parser.parse_known_args(argv)
    try:
        _draw(given, trainer)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _draw(given: argparse.Namespace, trainer: Sequence[str]) -> None:
    report = content_of(given.report) if given.report else None
    if report is not None and not is_report(report):
        raise ConfigError(f"{given.report} is a page, but no report of a run")
    missing = [str(file) for file in given.files if not file.is_file()]
    if missing:
        raise ConfigError(f"{', '.join(missing)} cannot be found; name adapter files")
    values, _, tables = read_options(trainer, Notices())
    config = TrainConfig.from_values(values, dataset_tables=tables)
    if config.model.pretrained_model_name_or_path is None:
        raise ConfigError("no base model: give pretrained_model_name_or_path, or a --config_file that does")
    prompts = _prompts(config, given.seeds)
    files, strengths = list(dict.fromkeys(given.files)), list(dict.fromkeys(given.strengths))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    count = len(files) * len(strengths) * len(prompts)
    pictures: dict[tuple[Path, float, int], Image] = {}
    for number, one in enumerate(draw_all(config, files, strengths, prompts, device=device), start=1):
        pictures[(one.file, one.strength, one.prompt)] = one.image
        print(f"\r{number} of {count} pictures", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    names = _names(files)
    sheets = [
        Sheet(
            title=prompt.prompt,
            details=details(prompt),
            columns=tuple(names),
            rows=tuple(f"{strength:g}" for strength in strengths),
            cells=tuple(
                tuple(pictures[(file, strength, number)] for file in files) for strength in strengths
            ),
        )
        for number, prompt in enumerate(prompts)
    ]
    with refusals_named(given.output), replacing(given.output) as temporary:
        draw_sheets(sheets).save(temporary)
    print(given.output)
    shown = [sheet_content(sheet) for sheet in sheets]
    about = f"{', '.join(names)} at {', '.join(f'{one:g}' for one in strengths)}"
    if given.html is not None:
        content = {"name": given.output.stem, "about": about, "sheets": shown}
        _write(given.html, render(content, kind="grid", title=f"{given.output.stem} - contact sheet"))
    if report is not None:
        page = render(
            {**report, "sheets": shown}, kind="report", title=f"{report['run']['name']} - training report"
        )
        _write(given.report, page)


def _prompts(config: TrainConfig, seeds: Sequence[int] | None) -> list[SamplePrompt]:
    """The sample prompts, each with each seed."""
    source = config.sampling.sample_prompts
    if source is None:
        raise ConfigError("no prompts: give sample_prompts, a prompt file or a text")
    loaded = load_prompts(source)
    for notice in loaded.notices:
        print(notice, file=sys.stderr)
    if not seeds:
        return list(loaded.prompts)
    return [replace(prompt, seed=seed) for prompt in loaded.prompts for seed in seeds]


def _names(files: Sequence[Path]) -> list[str]:
    """Stems, with the folder before them where two are alike."""
    stems = [file.stem for file in files]
    return [
        f"{file.resolve().parent.name}/{file.stem}" if stems.count(file.stem) > 1 else file.stem
        for file in files
    ]


def _write(path: Path, text: str) -> None:
    with refusals_named(path):
        write_text(path, text)
    print(path)


if __name__ == "__main__":
    sys.exit(main())
