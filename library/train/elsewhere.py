"""Where the end of a run goes when the disk of its output refuses it: weights in memory alone would be lost."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

from library.errors import WriteFailed
from library.files.refusals import refusals_named

logger = logging.getLogger(__name__)


def places() -> Iterator[Path]:
    """The user's home, which a cluster's job and a restart leave alone, then the folder of temporary files."""
    with suppress(RuntimeError):  # a user without one
        yield Path.home()
    with suppress(OSError):  # none can be written to
        yield Path(tempfile.gettempdir())


class Elsewhere:
    """What could not be written to the output folder `missed` and is kept in other places, in folders of this run."""

    def __init__(self, missed: Path, run: str) -> None:
        self._missed, self._run = missed, run
        self._folders: dict[Path, Path] = {}  # by place
        self._refused: list[WriteFailed] = []
        self.kept: list[Path] = []

    def put(self, name: str, write: Callable[[Path], None], refused: WriteFailed) -> Path:
        """Let `write` make the file or folder `name`, which the output folder `refused`. Returns where it is.

        Raises WriteFailed where no place takes it.
        """
        logger.warning("%s It is tried elsewhere", refused)
        tried = list(places())
        for place in tried:
            try:
                with refusals_named(place):
                    target = self._folder(place) / name
                    write(target)
            except WriteFailed as error:
                logger.warning("%s", error)
                with suppress(KeyError, OSError):  # it could not even be made; something else is in it
                    self._folders[place].rmdir()
                    del self._folders[place]
                continue
            self._refused.append(refused)
            self.kept.append(target)
            return target
        raise WriteFailed(f"{refused} Nor does it fit into {' or '.join(map(str, tried))}") from refused

    @property
    def notice(self) -> str:
        """What was refused, where it is and what to do, as one sentence; empty where nothing was."""
        if not self.kept:
            return ""
        kept = " and ".join(map(str, self.kept))
        return f"{self._refused[0]} Whole, elsewhere: {kept}; make room and move it to {self._missed}"

    def _folder(self, place: Path) -> Path:
        # A name that nobody has: the place is not this run's, and others write there, too.
        if place not in self._folders:
            self._folders[place] = Path(tempfile.mkdtemp(prefix=f"polyrank-{self._run}-", dir=place))
        return self._folders[place]
