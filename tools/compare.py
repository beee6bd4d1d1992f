"""Put runs next to each other in one HTML page: options that differ, curves over each other, samples side by side.

    python tools/compare.py output/run1 output/run2 --output compare.html

A run is its report (<name>.report.html), its log (<name>-log.jsonl), or the output_dir that holds one of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.errors import TrainerError
from library.report.compare import write_comparison


def main(argv: Sequence[str] | None = None) -> int:
    """Command line. Returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, help="reports, logs, or output folders of runs")
    parser.add_argument(
        "--output", type=Path, default=Path("compare.html"), help="page to write (compare.html)"
    )
    arguments = parser.parse_args(argv)
    try:
        write_comparison(arguments.runs, arguments.output)
    except TrainerError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(f"{arguments.output} ({arguments.output.stat().st_size / 1e6:.1f} MB)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
