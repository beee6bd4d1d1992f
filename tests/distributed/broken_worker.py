"""One rank of two, where something is broken: `copies` and `silence` between the ranks, `hang` of the one that is left
when the other is killed, `orphans` that are left by what started them. Started by library.distributed.supervise.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch.distributed as dist

from library.distributed import probe, watch
from library.distributed.launch import join, this_process
from library.leaving import leave


def lose_copies(operations: list[dist.P2POp]) -> list[dist.Work]:
    """Copies that say they have arrived, and have not: what some boards do from GPU to GPU."""
    for work in send(operations):
        work.wait()
    for operation in operations:
        if operation.op is dist.irecv:
            operation.tensor.zero_()
    return []


send = dist.batch_isend_irecv

if __name__ == "__main__":
    broken = sys.argv[1]
    watch.GRACE_SECONDS = 0.5
    world = this_process()
    group = join(world, None)
    if world.rank == 1 and broken == "copies":
        dist.batch_isend_irecv = lose_copies
    elif world.rank == 1 and broken == "hang":
        os.kill(os.getpid(), signal.SIGKILL)
    elif broken == "silence":
        probe.SECONDS = 1.0
    if broken == "orphans":
        Path(sys.argv[2], str(os.getpid())).touch()
    if broken in ("hang", "orphans") or (broken == "silence" and world.rank == 1):
        time.sleep(120)
    try:
        probe.probe(world)
        group.close()
    except Exception as error:  # noqa: BLE001 - as the command line does
        os._exit(leave(error))
