"""Trains a LoRA or LyCORIS network for FLUX.1: the command line and nothing else.

    accelerate launch flux_train_network.py --config_file configs/quickstart.toml
    python flux_train_network.py --config_file configs/quickstart.toml --num_gpus 4

Exit codes: 0 done, 1 a bug of ours (traceback), 2 something given cannot be used (one sentence), 3 the loss is no
longer finite, 4 stopped by a signal after the state was saved, 5 a file could not be written, 6 memory ran out,
128 + n ended by signal n. Whatever happens, the last line on the screen says it in one sentence.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import library
from library.config.load import load_config
from library.distributed.supervise import ranks_to_start, run_ranks
from library.errors import UserError
from library.leaving import leave
from library.startup import StartClock

HERE = Path(__file__).resolve().parent


def check_own_library() -> None:
    """Another package named `library` (sd-scripts installs one) must not answer in place of ours."""
    found = Path(library.__file__ or "").resolve().parent
    if found != HERE / "library":
        raise UserError(
            f"Python found the package `library` in {found}, not the one beside {Path(__file__).name}; "
            "use an environment of its own, without sd-scripts installed in it"
        )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the trainer with command-line `arguments` (without the program's name). Returns the exit code."""
    clock = StartClock()
    words = sys.argv[1:] if arguments is None else arguments
    try:
        check_own_library()
        loaded = load_config(words)
        # CPU threads that wait by spinning starve each other as soon as another process wants a core (a step took
        # four times as long); a short spin is as fast on a quiet machine. Read by OpenMP when torch is imported.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        ranks = ranks_to_start(loaded.config)
        if ranks > 1:
            return run_ranks([sys.executable, str(HERE / Path(__file__).name), *words], ranks)
        # torch takes seconds to import: --help, a wrong option and a missing file answer without it.
        clock.mark("config")
        from library.train.setup import run  # noqa: PLC0415

        clock.mark("imports")
        run(loaded, clock)
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001 - the last line must say what happened
        return leave(error)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Leave at once: a rank that failed must not wait in interpreter shutdown for ranks that wait for it.
        os._exit(code)
