"""Writes down what each step of a real run trains on, as it does so, and may strike a rank at a chosen step."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

from torch import Tensor

from library.flow.objective import Objective
from library.train.trainer import Trainer

Blow = Callable[[Trainer], None]  # what happens to a rank just before it launches a step


@contextmanager
def recorded(folder: Path, blows: Mapping[tuple[int, int], Blow] | None = None) -> Iterator[None]:
    """Meanwhile every launched step is a line of `folder`/rank<r>.jsonl, with all that went into it on this rank.

    `blows`: by (rank, step), steps counted from 1. Everything done is the trainer's own; nothing is replaced.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rank = int(os.environ.get("RANK", "0"))
    launch, micro_step, draw = Trainer.launch, Trainer.micro_step, Objective.draw
    launched: dict[int, int] = {}  # steps of each trainer: it may be a step ahead of its state
    micros: list[dict[str, Any]] = []

    def drawing(self: Objective, *args: Any, **kwargs: Any) -> Any:
        drawn = draw(self, *args, **kwargs)
        micros.append({"t": drawn.t.tolist(), "noise": hashes(drawn.noise), "x_t": hashes(drawn.x_t)})
        return drawn

    def stepping(self: Trainer, batch: Any) -> Tensor:
        loss = micro_step(self, batch)
        micros[-1] |= {
            "samples": [list(visit) for visit in batch.visits], "captions": list(batch.captions),
            "shares": batch.shares.tolist(),
        }  # fmt: skip
        return loss

    def launching(self: Trainer, batches: Any) -> Any:
        step = launched[id(self)] = launched.get(id(self), self.state.step) + 1
        if blows and (rank, step) in blows:
            blows[rank, step](self)
        micros.clear()
        result = launch(self, batches)
        line = {
            "step": step, "ranks": self.backend.world.size, "rates": dict(result.rates), "micros": micros,
        }  # fmt: skip
        with (folder / f"rank{rank}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        return result

    with (
        patch.object(Trainer, "launch", launching),
        patch.object(Trainer, "micro_step", stepping),
        patch.object(Objective, "draw", drawing),
    ):
        yield


def hashes(tensor: Tensor) -> list[str]:
    """Of the bits of each sample, [B, ...]."""
    return [hashlib.sha256(one.detach().cpu().contiguous().numpy().tobytes()).hexdigest() for one in tensor]


def steps_of(folder: Path) -> dict[int, dict[str, Any]]:
    """By step what all ranks together trained on, in the plan's order, fillers left out, and its learning rates.

    A step that a rank had launched when another one died is left out: not all of it was trained.
    """
    by_rank = []
    for file in sorted(folder.glob("rank*.jsonl")):
        lines = [json.loads(line) for line in file.read_text("utf-8").splitlines()]
        by_rank.append({line["step"]: line for line in lines})
    steps = {}
    for step in set.intersection(*(set(lines) for lines in by_rank)):
        parts = [lines[step] for lines in by_rank]
        assert parts[0]["ranks"] == len(parts)
        assert all(part["rates"] == parts[0]["rates"] for part in parts)
        turns = zip(*(part["micros"] for part in parts), strict=True)
        real = [micro for turn in turns for micro in turn if any(micro["shares"])]
        steps[step] = {"rates": parts[0]["rates"], "trained on": real}
    return steps
