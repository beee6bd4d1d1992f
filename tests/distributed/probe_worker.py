"""One rank that checks what ranks send one another, on a machine where something is broken: `copies` or `silence`."""

from __future__ import annotations

import os
import sys
import time

import torch.distributed as dist

from library.distributed import probe
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
    world = this_process()
    group = join(world, None)
    if world.rank == 1 and sys.argv[1] == "copies":
        dist.batch_isend_irecv = lose_copies
    if sys.argv[1] == "silence":
        probe.SECONDS = 1.0
        if world.rank == 1:
            time.sleep(60)
    try:
        probe.probe(world)
        group.close()
    except Exception as error:  # noqa: BLE001 - as the command line does
        os._exit(leave(error))
