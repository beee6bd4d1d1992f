"""`--num_gpus N`: start N ranks of this run on this machine, look after them, and say how it ended.

This process does nothing else and imports no torch unless it has to count GPUs. Ranks share its terminal and its
process group. When one fails, the others get some seconds to end by themselves and are then killed; the sentence of
the rank at fault is the last on the screen, and its exit code is ours.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from library.config.ranks import launched_ranks
from library.config.train_config import TrainConfig
from library.errors import EnvironmentUnsupported
from library.leaving import BEFORE_TRAINING, STARTER, Ending, read_report, say

LISTENING = "POLYRANK_LISTENING"  # number of the open socket on which rank 0 keeps the ranks' store
STOP_SIGNALS = tuple(name for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))
POLL_SECONDS = 0.1
GRACE_SECONDS = 10.0  # for the other ranks to end by themselves
AFTERMATH = ("SIGABRT",)  # how torch ends a rank whose peers are gone
HINTS = {
    "SIGKILL": "the system does that when main memory runs out: lower max_data_loader_n_workers or blocks_to_swap",
    "SIGBUS": "shared memory has likely run out: give /dev/shm more room, or set max_data_loader_n_workers = 0",
}


def ranks_to_start(config: TrainConfig) -> int:
    """How many ranks this process has to start; 1 where it is to do the work itself."""
    wanted, run = config.distributed.num_gpus, config.run
    shows_only = run.dry_run or run.output_config or config.dataset.debug_dataset
    if wanted is None or shows_only or launched_ranks(os.environ) is not None:
        return 1
    return wanted or count_gpus()


def count_gpus() -> int:
    """The GPUs that this process may use; 1 where there is none, as the CPU does the work then."""
    import torch  # noqa: PLC0415 - takes seconds, and only those who ask for all GPUs wait for it

    return max(1, torch.cuda.device_count())


def run_ranks(command: Sequence[str], count: int) -> int:
    """Start `count` ranks of `command`, wait for them and have the last word. Returns the exit code."""
    if os.name != "posix":
        raise EnvironmentUnsupported(
            "--num_gpus starts no processes on this system: use torchrun or accelerate launch"
        )
    with tempfile.TemporaryDirectory(prefix="polyrank-ranks-") as folder:
        ranks = Ranks(command, count, Path(folder))
        with passing_on(ranks):
            ending = ranks.wait()
    if ending is None:
        return 0
    if sys.stderr.isatty():
        sys.stderr.write("\r\x1b[K\x1b[?25h")  # a bar that nobody took away, and the cursor that it hid
    say(ending)
    return ending.code


class Ranks:
    """The processes of a run, from their start to their end."""

    def __init__(self, command: Sequence[str], count: int, folder: Path) -> None:
        self._folder = folder
        self.asked: int | None = None  # the first stop signal that was passed on
        with socket.create_server(("127.0.0.1", 0), backlog=count) as listening:
            port = listening.getsockname()[1]
            self.processes = [
                subprocess.Popen(
                    command,
                    env=rank_environment(os.environ, rank, count, port, listening.fileno(), folder),
                    pass_fds=(listening.fileno(),) if rank == 0 else (),
                )
                for rank in range(count)
            ]

    def signal(self, number: int) -> None:
        """Pass a signal on to all that still run."""
        self.asked = self.asked or number
        for process in self.processes:
            process.send_signal(number)

    def wait(self) -> Ending | None:
        """Wait until all are gone. Returns why they ended; None where all is done."""
        killed: set[int] = set()
        first = 0.0  # when the first one failed
        while any(code is None for code in self._codes()):
            if not first and any(self._codes()):
                first = time.monotonic()
            if first and time.monotonic() - first > GRACE_SECONDS:
                for rank, process in enumerate(self.processes):
                    if process.poll() is None:
                        killed.add(rank)
                        process.kill()
            time.sleep(POLL_SECONDS)
        endings = [self._ending(rank, killed=rank in killed) for rank in range(len(self.processes))]
        return at_fault([ending for ending in endings if ending is not None])

    def _codes(self) -> list[int | None]:
        return [process.poll() for process in self.processes]

    def _ending(self, rank: int, *, killed: bool) -> Ending | None:
        """Why a rank ended: what it said itself, or what its exit code says unless it was `killed` here."""
        report, code = read_report(self._folder, rank), self.processes[rank].returncode
        return report if report is not None or killed or not code else without_report(rank, code, self.asked)


def rank_environment(
    inherited: Mapping[str, str], rank: int, count: int, port: int, listening: int, folder: Path
) -> dict[str, str]:
    """What a rank finds in its environment: the variables that torchrun sets, and where to leave its report."""
    threads = max(1, usable_cores() // count)
    return {
        "OMP_NUM_THREADS": str(threads),
        # Of a rank that fails, the others' connections break: torch's C++ would warn of each.
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        **inherited,
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), LISTENING: str(listening),
        STARTER: f"{os.getpid()}:{folder}",
    }  # fmt: skip


def usable_cores() -> int:
    """CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def without_report(rank: int, code: int, asked: int | None) -> Ending:
    """Why a rank ended that did not say so itself."""
    if code > 0:
        told, on_purpose = f"error: it ended with code {code}", False
    else:
        name = signal.Signals(-code).name
        hint = f" ({HINTS[name]})" if name in HINTS else ""
        told, on_purpose = f"error: it was ended by {name}{hint}", name not in AFTERMATH
        if -code == asked:
            told, rank = BEFORE_TRAINING.replace("stopped", f"stopped by {name}", 1), 0
    return Ending(
        code=code if code > 0 else 128 - code,
        sentence=told,
        on_purpose=on_purpose,
        rank=rank,
        when=time.time(),
    )


def at_fault(endings: Sequence[Ending]) -> Ending | None:
    """The ending that explains the others: what a rank did on purpose, before what may follow from it."""
    if not endings:
        return None
    first = min(endings, key=lambda end: (end.echo, not end.on_purpose, end.when))
    # Where several say the same, the first of them speaks for all.
    return min((end for end in endings if end.sentence == first.sentence), key=lambda end: end.rank)


@contextmanager
def passing_on(ranks: Ranks) -> Iterator[None]:
    """Pass stop signals on to the ranks."""

    def pass_on(number: int, frame: FrameType | None) -> None:
        del frame
        ranks.signal(number)

    before = {name: signal.signal(signal.Signals[name], pass_on) for name in STOP_SIGNALS}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(signal.Signals[name], handler)
