"""Many measurements of `tools.bench_train` in one command: each a process of its own, with a time limit.

    python -m tools.bench_sweep --json speed.jsonl                       # the cases below, in order
    python -m tools.bench_sweep --json speed.jsonl --only fp8 --minutes 10
    python -m tools.bench_sweep --json speed.jsonl --case "mine: --compile_blocks on --train_batch_size 2"

A case is a name and options of `tools.bench_train`. What each gives is appended to the file as one line of JSON
as soon as it ends; a case that fails or takes too long is a line that says so, and the next one begins. Cases
that are in the file are not run again. With --minutes, no case begins that would begin after them.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from library.errors import ConfigError

COMPILED = "--compile_blocks on --steps 8 --warmup 6"
EAGER = "--steps 5 --warmup 3"
LOKR = "--network_module lycoris.kohya --network_args algo=lokr factor=4"
LOHA = "--network_module lycoris.kohya --network_args algo=loha"
SIZES = "1024x1024 896x1152 1152x896 832x1216 1216x832"

# In the order of what a reader wants to know first; the baseline leads, so that a short run has it.
CASES: Mapping[str, str] = {
    "compiled, as before": f"{COMPILED} --join_adapter off --read_at_once",
    "compiled": f"{COMPILED} --join_adapter off",
    "compiled, joined": f"{COMPILED} --join_adapter on",
    "fp8": f"{COMPILED} --base_compute fp8",
    "fp8, recomputed": f"{COMPILED} --base_compute fp8 --gradient_checkpointing",
    "fp8, recomputed cheaply": f"{COMPILED} --base_compute fp8 --gradient_checkpointing --recompute cheap",
    "compiled, flash": f"{COMPILED} --attention flash",
    "compiled, cudnn": f"{COMPILED} --attention cudnn",
    "eager, as before": f"{EAGER} --join_adapter off --read_at_once",
    "eager": f"{EAGER} --join_adapter off",
    "eager, joined": f"{EAGER} --join_adapter on",
    "compiled, recomputed": f"{COMPILED} --gradient_checkpointing",
    "compiled, recomputed cheaply": f"{COMPILED} --gradient_checkpointing --recompute cheap",
    "lokr, compiled": f"{COMPILED} {LOKR}",
    "lokr full, compiled": f"{COMPILED} {LOKR} full_matrix=True",
    "loha, compiled": f"{COMPILED} {LOHA}",
    "fp8, batch 4": f"{COMPILED} --base_compute fp8 --train_batch_size 4 --gradient_checkpointing "
    "--recompute cheap --steps 4",
    "fp8, batch 4, few recomputed": f"{COMPILED} --base_compute fp8 --train_batch_size 4 --gradient_checkpointing "
    "--recompute cheap --recompute_blocks auto --steps 4",
    "five buckets": f"{COMPILED} --resolutions {SIZES} --warmup 12 --steps 20",
    "mask": f"{COMPILED} --apply_t5_attn_mask",
    "fp8, swap": f"{COMPILED} --base_compute fp8 --gradient_checkpointing --blocks_to_swap 18",
    "int8": f"{COMPILED} --base_compute int8",
    "fp8, eager": f"{EAGER} --base_compute fp8",
}


def run_case(name: str, words: Sequence[str], *, seconds: float) -> dict[str, Any]:
    """The measurement as `bench_train` reports it, or `failed`: why there is none."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.jsonl"
        command = [sys.executable, "-m", "tools.bench_train", "--json", str(result), *words]
        base: dict[str, Any] = {"case": name, "options": list(words)}
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, timeout=seconds, check=False,
                cwd=Path(__file__).resolve().parents[1],
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {**base, "failed": f"no result within {seconds:.0f} s"}
        took = round(time.monotonic() - started, 1)
        if ended.returncode != 0 or not result.exists():
            lines = [line for line in ended.stderr.splitlines() if line.strip()]
            return {
                **base,
                "failed": lines[-1] if lines else "no output",
                "stderr": lines[-30:],
                "took": took,
            }
        # What a run says of itself (which attention, what could not be compiled) belongs to its figure.
        said = re.findall(r"^.*(?:attention:|base_compute:|compiled).*$", ended.stderr, flags=re.MULTILINE)
        return {**base, **json.loads(result.read_text(encoding="utf-8")), **base, "said": said, "took": took}


def chosen_cases(only: str | None, given: Sequence[str]) -> dict[str, list[str]]:
    """Name to options: those of --case if there are any, else the table's; `only` is a pattern for names.

    Raises ConfigError for a case without a name.
    """
    cases = dict(CASES)
    if given:
        parts = [text.partition(":") for text in given]
        nameless = [text for text, (name, colon, _) in zip(given, parts, strict=True) if not (colon and name)]
        if nameless:
            raise ConfigError(f'--case {nameless[0]!r} has no name: write "name: options"')
        cases = {name.strip(): options for name, _, options in parts}
    return {
        name: shlex.split(options) for name, options in cases.items() if only is None or re.search(only, name)
    }


def measured_already(file: Path) -> set[str]:
    """Names of cases that have a figure in `file`."""
    if not file.exists():
        return set()
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
    return {str(line["case"]) for line in lines if "case" in line and "failed" not in line}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the cases; 1 if one of them has no figure."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, required=True, metavar="FILE", help="results are appended here")
    parser.add_argument("--only", metavar="PATTERN", help="cases whose name matches")
    parser.add_argument(
        "--case", action="append", default=[], metavar="NAME: OPTIONS", help="instead of the table"
    )
    parser.add_argument("--timeout", type=float, default=240, metavar="SECONDS", help="of one case")
    parser.add_argument("--minutes", type=float, help="begin no case after this")
    parser.add_argument("--list", action="store_true", help="show the cases and end")
    arguments = parser.parse_args(argv)
    try:
        cases = chosen_cases(arguments.only, arguments.case)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    if arguments.list:
        for name, words in cases.items():
            print(f"{name}: {shlex.join(words)}")
        return 0
    began, failed = time.monotonic(), 0
    for name, words in cases.items():
        if name in measured_already(arguments.json):
            continue
        left = (arguments.minutes or float("inf")) * 60 - (time.monotonic() - began)
        if left <= 0:
            break
        result = run_case(name, words, seconds=min(arguments.timeout, left))
        failed += "failed" in result
        with arguments.json.open("a", encoding="utf-8") as file:
            file.write(json.dumps(result) + "\n")
        figure = result.get("failed") or f"{result['seconds_per_step']} s, {result['peak_gb_allocated']} GB"
        print(f"{name}: {figure}", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
