"""What is said at the end of a run: how long it took, what was written, and how to use it."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

from library.train.naming import workflow_path

logger = logging.getLogger(__name__)


def show_result(written: Sequence[Path], *, steps: int, seconds: float) -> None:
    """Say what a run of `steps` steps wrote, oldest first in `written`, and how to use the last network file."""
    networks = [path for path in written if path.is_file()]
    if not networks:
        return
    earlier, last = networks[:-1], networks[-1]
    logger.info("trained %d steps in %s", steps, timedelta(seconds=round(seconds)))
    for what, paths in (("state", [path for path in written if path.is_dir()]), ("network file", earlier)):
        if len(paths) == 1:
            logger.info("wrote %s", paths[0])
        elif paths:
            logger.info(
                "wrote %d %ss, %s to %s in %s", len(paths), what, paths[0].name, paths[-1].name, last.parent
            )
    logger.info("wrote %s (%.1f MB)", last, last.stat().st_size / 1e6)
    workflow = workflow_path(last)
    logger.info(
        'use %s: in ComfyUI put it into models/loras and %s; in diffusers pipeline.load_lora_weights("%s")',
        last.name,
        f"open {workflow.name}" if workflow.is_file() else "add a Load LoRA node",
        last,
    )
