"""The loss of each sample of a step, brought from all ranks to all with the step's own numbers.

No rank waits for it: a rank writes what its samples lost into its own rows of a table that is zero elsewhere, so the
one sum over ranks that a step makes anyway puts the table together, and who reads the loss has it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from library.data.records import Batch
from library.distributed.base import World
from library.flow.noise import on_device

COLUMNS = 3  # picture + 1 (0: nobody), timestep, loss; float32 holds the numbers of 16 million pictures


class SampleLoss(NamedTuple):
    """What one sample lost in one step."""

    image: int  # its position among the pictures that are watched
    t: float  # noise level in [0, 1]
    loss: float


class SampleLosses:
    """Gathers the losses of samples whose key is in `images`; `rows` is the most samples that a rank has in a step."""

    def __init__(self, images: Sequence[str], *, rows: int, world: World) -> None:
        self._index = {key: number for number, key in enumerate(images, start=1)}
        self._rows, self._world = rows, world
        self._noted: list[Tensor] = []

    def images(self, batch: Batch) -> Tensor:  # [B] on the device
        """Which pictures a micro-batch has; made before it is computed, so that the copy waits for nothing."""
        real = (batch.shares > 0).tolist()
        numbers = [
            self._index.get(visit.sample, 0) if counts else 0
            for visit, counts in zip(batch.visits, real, strict=True)
        ]
        return on_device(torch.tensor(numbers, dtype=torch.float32), self._world.device)

    def note(self, images: Tensor, t: Tensor, losses: Tensor) -> None:
        """Keep what a micro-batch lost: its `images` [B], `t` [B] and `losses` [B], all on the device."""
        self._noted.append(torch.stack((images, t.detach().float(), losses.detach().float()), dim=1))

    def take(self) -> Tensor:  # [ranks * rows * COLUMNS]
        """This rank's part of the table, to be summed over ranks; begins the next step."""
        noted, self._noted = torch.cat(self._noted), []
        table = torch.zeros(self._world.size, self._rows, COLUMNS, device=noted.device)
        table[self._world.rank, : len(noted)] = noted
        return table.flatten()

    def read(self, numbers: Sequence[float]) -> tuple[SampleLoss, ...]:
        """The samples in a summed table, in an order that does not depend on who had them."""
        rows = (numbers[start : start + COLUMNS] for start in range(0, len(numbers), COLUMNS))
        return tuple(sorted(SampleLoss(int(image) - 1, t, loss) for image, t, loss in rows if image > 0))
