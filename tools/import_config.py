"""Turn a config of another program into ours: `python -m tools.import_config FILE [-o train.toml]`.

Reads presets of the kohya_ss GUI, ai-toolkit jobs, SimpleTuner's config.json and inputs of Replicate's FLUX trainer.
Prints or writes the options as TOML and lists what became of each key.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.config.importers.recognise import import_file
from library.config.importers.report import account, dataset_toml, options_toml
from library.errors import ConfigError, TrainerError
from library.files.atomic import write_text


def main(arguments: list[str] | None = None) -> int:
    """Command line; the list goes to standard error when the TOML goes to standard output."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the config of the other program (.json, .yaml)")
    parser.add_argument("-o", "--output", type=Path, help="write the options here, instead of printing them")
    parser.add_argument(
        "--dataset_out", type=Path, help="write the datasets here; with -o alone, beside it as ..._data.toml"
    )
    given = parser.parse_args(arguments)
    try:
        _run(given.file, given.output, given.dataset_out)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _run(file: Path, output: Path | None, dataset_out: Path | None) -> None:
    imported = import_file(file)
    if imported.dataset is not None and output is not None and dataset_out is None:
        dataset_out = output.with_name(f"{output.stem}_data.toml")
    for path in (output, dataset_out):
        if path is not None and path.exists():
            raise ConfigError(f"{path} exists; remove it or name another file")
    if imported.dataset is not None:
        text = dataset_toml(imported, file.name)
        if dataset_out is None:
            print(f"# ---- datasets: write this into a file of its own and name it as dataset_config\n{text}")
        else:
            write_text(dataset_out, text)
    named = str(dataset_out) if imported.dataset is not None and dataset_out is not None else None
    options = options_toml(imported, file.name, dataset=named)
    if output is None:
        print(f"# ---- options\n{options}")
    else:
        write_text(output, options)
    written = ", ".join(str(path) for path in (output, dataset_out) if path is not None and path.exists())
    said = account(imported) + (f"wrote {written}\n" if written else "")
    print(said, end="", file=sys.stdout if output else sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
