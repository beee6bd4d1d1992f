"""Sending what a run writes to the Hugging Face Hub. A failure is a warning: the file is safe on this machine."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from queue import Queue

from library.config.sections.saving import SavingConfig
from library.errors import UserError
from library.files.hub import HubFolder, first_line
from library.files.model_card import MARK

logger = logging.getLogger(__name__)

PATIENCE = 300.0  # seconds that a run waits for an upload; other ranks wait meanwhile, ten minutes at most under NCCL


def hub_folder(config: SavingConfig) -> HubFolder | None:
    """Where the options upload to; None if nowhere."""
    if config.huggingface_repo_id is None:
        return None
    return HubFolder(
        repo_id=config.huggingface_repo_id,
        repo_type=config.huggingface_repo_type or "model",
        path=config.huggingface_path_in_repo or "",
        private=config.huggingface_repo_visibility != "public",
        token=config.huggingface_token,
    )


def check_hub(config: SavingConfig) -> None:
    """Say what is plainly missing for uploading, without asking the network. Raises ConfigError."""
    folder = hub_folder(config)
    if folder is not None:
        folder.check()


def open_repository(config: SavingConfig) -> None:
    """Make the repository before the work begins. A token that is refused is an error, a Hub that is away is not."""
    folder = hub_folder(config)
    if folder is None:
        return
    try:
        folder.create()
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - whatever is wrong with the network, training can go on
        logger.warning("the repository %s cannot be opened now (%s)", folder.repo_id, first_line(error))


class Uploader:
    """Uploads one after another, in the order given, on a thread of its own; `background` lets the caller go on."""

    def __init__(self, folder: HubFolder, *, background: bool) -> None:
        self._folder, self._background = folder, background
        self._queue: Queue[tuple[Path, Callable[[], str]]] = Queue()
        self._pending: list[Path] = []
        self._changed = threading.Condition()
        # A daemon: an upload that hangs must not keep a finished run from ending.
        threading.Thread(target=self._work, name="upload", daemon=True).start()

    def put(self, path: Path, *, now: bool = False) -> None:
        """Upload a file or folder; `now` waits for it even if others go in the background."""
        self._enqueue(path, lambda: self._folder.put(path), now=now)

    def put_card(self, path: Path, shown: Mapping[str, Path]) -> None:
        """Upload a model card as the repository's page, with the pictures it shows, by their path beside it."""
        self._enqueue(path, lambda: self._folder.put_card(path, shown, mark=MARK), now=False)

    def _enqueue(self, path: Path, send: Callable[[], str], *, now: bool) -> None:
        with self._changed:
            self._pending.append(path)
        self._queue.put((path, send))
        if now or not self._background:
            self.wait_for(path)

    def wait_for(self, path: Path) -> None:
        """Return when `path` is no longer needed, or it takes too long: the run goes on, the file may be removed."""
        with self._changed:
            self._changed.wait_for(lambda: path not in self._pending, timeout=PATIENCE)

    def finish(self, patience: float = PATIENCE) -> None:
        """Wait for what is still on its way; what takes longer than `patience` seconds is named."""
        with self._changed:
            if self._pending:
                logger.info("waiting for %d uploads", len(self._pending))
            self._changed.wait_for(lambda: not self._pending, timeout=patience)
            left = ", ".join(path.name for path in self._pending)
        if left:
            logger.warning("not uploaded within %.0f s: %s", patience, left)

    def _work(self) -> None:
        while True:
            path, send = self._queue.get()
            self._send(path, send)
            with self._changed:
                self._pending.remove(path)
                self._changed.notify_all()

    def _send(self, path: Path, send: Callable[[], str]) -> None:
        try:
            target = send()
            logger.info("uploaded %s to %s/%s", path.name, self._folder.repo_id, target)
        except Exception as error:  # noqa: BLE001 - whatever is wrong with the network, training goes on
            logger.warning(
                "%s could not be uploaded to %s (%s); it is safe in %s",
                path.name, self._folder.repo_id, first_line(error), path.parent,
            )  # fmt: skip
