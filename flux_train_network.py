"""Trains a LoRA or LyCORIS network for FLUX.1: the command line and nothing else.

    accelerate launch flux_train_network.py --config_file configs/quickstart.toml

Exit codes: 0 done, 1 a bug of ours (traceback), 2 something given cannot be used (one sentence), 3 the loss is no
longer finite, 4 stopped by a signal after the state was saved, 5 a file could not be written, 6 memory ran out, 130
Ctrl-C before training began. Whatever happens, the last line on the screen says it in one sentence.
"""

from __future__ import annotations

import errno
import os
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import library
from library.config.load import load_config
from library.errors import Interrupted, NothingToDo, TrainerError, UserError
from library.startup import StartClock

# What a disk says that is full, read-only or gone, which is no bug of ours
STORAGE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENODEV,
    errno.ESTALE,
)  # fmt: skip
INTERRUPTED = 130  # what a shell makes of Ctrl-C
GRACE_SECONDS = 5.0  # what other ranks leave rank 0 to say what is wrong
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
    try:
        check_own_library()
        loaded = load_config(sys.argv[1:] if arguments is None else arguments)
        # CPU threads that wait by spinning starve each other as soon as another process wants a core (a step took
        # four times as long); a short spin is as fast on a quiet machine. Read by OpenMP when torch is imported.
        os.environ.setdefault("GOMP_SPINCOUNT", "10000")
        # torch takes seconds to import: --help, a wrong option and a missing file answer without it.
        clock.mark("config")
        from library.train.setup import run  # noqa: PLC0415

        clock.mark("imports")
        run(loaded, clock)
    except TrainerError as error:
        if os.environ.get("RANK", "0") != "0":
            # What every rank finds wrong, rank 0 says; the launcher ends the others meanwhile.
            time.sleep(GRACE_SECONDS)
        say_last(str(error) if isinstance(error, Interrupted | NothingToDo) else f"error: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        say_last(
            "stopped before training began; caches made so far are kept, and the same command goes on from there"
        )
        return INTERRUPTED
    except Exception as error:  # noqa: BLE001 - the last line must say what happened, whatever it was
        if isinstance(error, OSError) and error.errno in STORAGE:
            say_last(
                f"error: {error.filename or 'a file'} cannot be read or written ({os.strerror(error.errno)}); "
                "what was saved before is whole"
            )
            return UserError.exit_code
        traceback.print_exc()
        what = " ".join(str(error).split()) or "no further word"
        say_last(f"error: {type(error).__name__}: {what}; the lines above show where, please report them")
        return 1
    return 0


def say_last(sentence: str) -> None:
    """Print the sentence that is to be the last on the screen; other ranks say who they are."""
    rank = os.environ.get("RANK", "0")
    print(sentence if rank == "0" else f"rank {rank}: {sentence}", file=sys.stderr, flush=True)  # noqa: T201


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:
        # Leave at once: a rank that failed must not wait in interpreter shutdown for ranks that wait for it.
        os._exit(code)
