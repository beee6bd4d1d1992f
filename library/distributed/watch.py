"""A thread that looks after the other ranks: a rank that waits for one that is gone would wait for ever.

The main thread may sit in a collective, where no signal and no exception reaches it. So a thread notices that a rank
of this machine ended (its process does), that a rank elsewhere said why it stopped (the store does), and that the
launcher itself is gone. A rank that is left behind has some seconds to end by itself, and then leaves without a word.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from library.errors import RankFollowed
from library.leaving import leave

LOOK_SECONDS = 1.0
GRACE_SECONDS = (
    10.0  # for a rank to end by itself, as by the error of a broken connection, or to finish a file
)


@dataclass(slots=True)
class Watch:
    """Ends this process some seconds after another rank has failed, unless it has ended, or was stopped, by then."""

    store: Store
    peers: Iterable[int]  # process ids of this machine's other ranks
    starter: int  # process id of what started this rank
    _stopped: threading.Event = field(default_factory=threading.Event, init=False)

    def start(self) -> None:
        """Begin to watch."""
        threading.Thread(target=self._run, name="watch", daemon=True).start()

    def stop(self) -> None:
        """From now on ranks may leave."""
        self._stopped.set()

    def _run(self) -> None:
        peers, starter = Ends(self.peers), Ends((self.starter,))
        while not self._stopped.wait(LOOK_SECONDS):
            if starter.any():
                # What it would have passed on when asked to end: the ranks save their state.
                starter = Ends(())
                os.kill(os.getpid(), signal.SIGTERM)
            if peers.any() or self._told():
                break
        if not self._stopped.wait(GRACE_SECONDS):
            os._exit(leave(RankFollowed("another rank is gone")))

    def _told(self) -> bool:
        """Whether a rank has said that it failed, or the rank that keeps the store is gone."""
        try:
            return self.store.check(["failure"])
        except dist.DistError:
            return True


class Ends:
    """Notices the end of processes, also of those that nobody has waited for yet."""

    def __init__(self, processes: Iterable[int]) -> None:
        self._gone = False
        self._poll = select.poll() if hasattr(os, "pidfd_open") else None
        for process in processes:
            self._add(process)

    def _add(self, process: int) -> None:
        if self._poll is None:
            return  # other systems than Linux: the store and the launcher will have to do
        try:
            self._poll.register(os.pidfd_open(process), select.POLLIN)
        except ProcessLookupError:
            self._gone = True
        except OSError:
            pass  # an old kernel

    def any(self) -> bool:
        """Whether one of them has ended."""
        return self._gone or (self._poll is not None and bool(self._poll.poll(0)))
