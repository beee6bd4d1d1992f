"""What lets encoding and writing go on at once: the device is given work ahead of its results, threads write."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from library.errors import DatasetError

Task = TypeVar("Task")
Result = TypeVar("Result")

IN_FLIGHT = 2  # batches that the device has been given and nobody has read
_WRITERS = 4  # a write waits for the disk most of its time
_BACKLOG = 32  # files that may wait to be written; up to 8 MB each


class Arriving:
    """Tensors on their way from the device to the CPU; `wait` waits for them and for nothing asked for later."""

    def __init__(self, *tensors: Tensor) -> None:
        self._host = [tensor.detach().to("cpu", non_blocking=True) for tensor in tensors]  # pinned, by torch
        self._event: torch.cuda.Event | None = None
        device = next((tensor.device for tensor in tensors if tensor.is_cuda), None)
        if device is not None:
            self._event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> list[Tensor]:
        """The tensors, in memory that is scarce: copy what is to be kept."""
        if self._event is not None:
            self._event.synchronize()
        return self._host


def launched_ahead(tasks: Iterable[Task], launch: Callable[[Task], Result]) -> Iterator[Result]:
    """What `launch` gives for each task, in order, once `IN_FLIGHT` more have been launched.

    Where `tasks` or `launch` raises, what was launched before is still given out.
    """
    flying: deque[Result] = deque()
    try:
        for task in tasks:
            flying.append(launch(task))
            if len(flying) > IN_FLIGHT:
                yield flying.popleft()
    except GeneratorExit:  # who asks wants no more
        raise
    except BaseException:
        while flying:
            yield flying.popleft()
        raise
    while flying:
        yield flying.popleft()


class Writers:
    """Threads that write cache files; a context manager that ends when all is written.

    Writes of one file happen in the order they were asked for. What is not written yet when something else fails is
    written all the same.
    """

    def __init__(self) -> None:
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix="cache-writer") for _ in range(_WRITERS)]
        self._waiting: deque[tuple[Path, Future[None]]] = deque()

    def __enter__(self) -> Writers:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._settle(0)
        finally:
            for thread in self._threads:
                thread.shutdown()

    def submit(self, path: Path, write: Callable[[], None]) -> None:
        """Have `write` write `path`. Raises DatasetError where an earlier file could not be written."""
        thread = self._threads[hash(path) % _WRITERS]
        self._waiting.append((path, thread.submit(write)))
        self._settle(_BACKLOG)

    def _settle(self, most: int) -> None:
        """Wait until at most so many files are left."""
        while self._waiting and (len(self._waiting) > most or self._waiting[0][1].done()):
            path, future = self._waiting.popleft()
            try:
                future.result()
            except OSError as error:
                raise DatasetError(
                    f"the cache file {path} cannot be written ({error}); free space there or cache in memory"
                ) from error
