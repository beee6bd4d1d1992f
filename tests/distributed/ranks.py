"""Ranks as processes of their own: each runs the trainer's main, told who it is as torchrun tells it.

They are forked from a server that has imported what a run imports, so a start takes a fraction of a second and a
test may kill many of them.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload([
    "flux_train_network", "library.train.setup", "networks.lora_flux", "tests.distributed.recorder",
    # What a run imports when it comes to it, more than two seconds' worth.
    "bitsandbytes", "torch._dynamo", "transformers.models.clip.modeling_clip", "transformers.models.t5.modeling_t5",
])  # fmt: skip

Around = Callable[[], AbstractContextManager[object]]  # surrounds the run within each rank; picklable


@dataclass(frozen=True)
class Ranks:
    """Running ranks."""

    processes: Sequence[multiprocessing.process.BaseProcess]
    screens: Sequence[Path]  # what each rank prints

    def said(self, rank: int = 0) -> str:
        """What a rank has printed so far, in one line."""
        return " ".join(self.screens[rank].read_text("utf-8").split())

    def kill(self) -> None:
        """kill -9 of all of them at once, as when the machine goes."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def ended(self, *, within: float = 120.0, patience: float = 20.0) -> list[int | None]:
        """Exit codes, minus the signal's number for a killed one.

        As a launcher does it, ranks that outlive a failed one are killed, here after `patience` seconds.
        """
        until = time.monotonic() + within
        while any(process.is_alive() for process in self.processes):
            if any(process.exitcode for process in self.processes):
                until = min(until, time.monotonic() + patience)
                patience = within
            if time.monotonic() > until:
                self.kill()
            time.sleep(0.02)
        return [process.exitcode for process in self.processes]


def start(arguments: Sequence[str], *, ranks: int, screens: Path, around: Around = nullcontext) -> Ranks:
    """Start `ranks` processes with the trainer's command-line `arguments`; what they print is kept in `screens`."""
    screens.mkdir(parents=True, exist_ok=True)
    files = [screens / f"rank{rank}.txt" for rank in range(ranks)]
    port = _free_port()
    processes = [
        _SERVER.Process(target=_run, args=(list(arguments), rank, ranks, port, files[rank], around))
        for rank in range(ranks)
    ]
    for process in processes:
        process.start()
    return Ranks(processes, files)


def _run(arguments: list[str], rank: int, ranks: int, port: int, screen: Path, around: Around) -> None:
    if ranks > 1:
        os.environ.update(
            RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
        )  # fmt: skip
    descriptor = os.open(screen, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    from flux_train_network import main

    with around():
        code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
