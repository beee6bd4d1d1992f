"""How many ranks a run has: `--num_gpus`, and what a launcher has started already."""

from __future__ import annotations

import os
from collections.abc import Mapping

from library.config.rule_context import Context
from library.errors import ConfigError
from library.leaving import starter


def launched_ranks(environment: Mapping[str, str]) -> int | None:
    """How many ranks a launcher (torchrun, accelerate, deepspeed, --num_gpus) started; None without one."""
    return int(environment["WORLD_SIZE"]) if "RANK" in environment and "WORLD_SIZE" in environment else None


def num_gpus_fits(context: Context) -> None:
    """--num_gpus starts ranks, of which there are none to start under a launcher."""
    chosen = context.config.distributed
    if chosen.num_gpus is None:
        return
    if chosen.distributed == "single" and chosen.num_gpus != 1:
        raise ConfigError(
            f"{context.said('distributed')} contradicts {context.said('num_gpus')}: give one of them"
        )
    launched = launched_ranks(os.environ)
    if launched is None or starter() is not None:
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE", launched))
    if chosen.num_gpus not in (0, here):
        raise ConfigError(
            f"{context.said('num_gpus')}, but a launcher started {here} process{'es' if here > 1 else ''} on this "
            "machine: start plain python, which starts the others itself, or leave num_gpus out"
        )
    context.notices.remarks.append(
        f"{context.said('num_gpus')} is not needed: a launcher started the processes"
    )
