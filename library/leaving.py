"""How a process leaves: with which exit code, and who has the last word on the screen.

A run of several ranks ends with one sentence, that of the rank at fault. A rank that `--num_gpus` started leaves its
sentence in a report, and the process that started it says one of them when all ranks are gone. Under another launcher
each rank decides for itself: who only follows is silent, and who may have found what all find waits for rank 0.
"""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import traceback
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from library.errors import Interrupted, NothingToDo, RankFollowed, RankLost, TrainerError, UserError

# What a disk says that is full, read-only or gone, which is no bug of ours
STORAGE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENODEV,
    errno.ESTALE,
)  # fmt: skip
INTERRUPTED = 130  # what a shell makes of Ctrl-C
BEFORE_TRAINING = (
    "stopped before training began; caches made so far are kept, and the same command goes on from there"
)
GRACE_SECONDS = 5.0  # what other ranks leave rank 0 to say what is wrong
FOLLOW_SECONDS = 8.0  # a launcher ends all as soon as one leaves: who has nothing to say leaves last
TOGETHER_SECONDS = 1.0  # in which rank 0 says what all raise at the same step
STARTER = "POLYRANK_STARTER"  # "<process id>:<folder for reports>", set for the ranks of --num_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Ending:
    """Why a process ends."""

    code: int
    sentence: str
    on_purpose: bool  # raised by the trainer itself: the cause, and no consequence of what another rank did
    echo: bool = False  # it follows from the end of another rank
    together: bool = False  # all ranks end so, at the same step
    trace: str = ""  # of a bug of ours
    rank: int = 0
    when: float = 0.0  # unix seconds


def ending_of(error: BaseException) -> Ending:
    """What an error that nobody handled means for the exit code and the last line."""
    if isinstance(error, TrainerError):
        plain = isinstance(error, Interrupted | NothingToDo)
        return _ending(
            error.exit_code, str(error) if plain else f"error: {error}", on_purpose=True,
            echo=isinstance(error, RankFollowed | RankLost), together=error.together,
        )  # fmt: skip
    if isinstance(error, KeyboardInterrupt):
        return _ending(INTERRUPTED, str(error) or BEFORE_TRAINING, on_purpose=True)
    if isinstance(error, OSError) and error.errno in STORAGE:
        return _ending(
            UserError.exit_code,
            f"error: {error.filename or 'a file'} cannot be read or written ({os.strerror(error.errno)}); "
            "what was saved before is whole",
            on_purpose=True,
        )
    what = " ".join(str(error).split()) or "no further word"
    return _ending(
        1,
        f"error: {type(error).__name__}: {what}; the lines above show where, please report them",
        on_purpose=False,
        trace="".join(traceback.format_exception(error)),
    )


def _ending(
    code: int, sentence: str, *, on_purpose: bool, echo: bool = False, together: bool = False, trace: str = ""
) -> Ending:
    return Ending(
        code=code, sentence=sentence, on_purpose=on_purpose, echo=echo, together=together, trace=trace,
        rank=int(os.environ.get("RANK", "0")), when=time.time(),
    )  # fmt: skip


def leave(error: BaseException) -> int:
    """Say why this process ends, or leave that to another. Returns the exit code to leave with."""
    ending = ending_of(error)
    folder = reports_folder()
    if folder is not None:
        write_report(folder, ending)
    elif isinstance(error, RankFollowed):
        time.sleep(FOLLOW_SECONDS)
    elif ending.rank == 0 or not ending.on_purpose or ending.echo:
        say(ending)
    elif ending.together:
        time.sleep(TOGETHER_SECONDS)
    else:
        time.sleep(GRACE_SECONDS)
        say(ending)
    return ending.code


def say(ending: Ending) -> None:
    """Print the sentence that is to be the last on the screen; other ranks than the first say who they are."""
    if ending.trace:
        sys.stderr.write(ending.trace)
    who = f"rank {ending.rank}: " if ending.rank else ""
    print(who + ending.sentence, file=sys.stderr, flush=True)  # noqa: T201


def starter() -> int | None:
    """The process id of the `--num_gpus` that started this rank; None if something else did."""
    process = os.environ.get(STARTER, "").partition(":")[0]
    return int(process) if process else None


def reports_folder() -> Path | None:
    """Where the process that started this rank looks for reports; None if there is none, or no longer."""
    folder = os.environ.get(STARTER, "").partition(":")[2]
    return Path(folder) if starter() == os.getppid() else None


def write_report(folder: Path, ending: Ending) -> None:
    """Leave `ending` for the process that started this rank. The first report of a rank counts."""
    path = folder / f"{ending.rank}.json"
    whole = path.with_suffix(f".{time.monotonic_ns()}")
    whole.write_text(json.dumps(asdict(ending)), encoding="utf-8")
    with suppress(FileExistsError):
        os.link(whole, path)


def read_report(folder: Path, rank: int) -> Ending | None:
    """What a rank has left."""
    path = folder / f"{rank}.json"
    return Ending(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None
