"""Pictures whose loss stays far above that of the others: a wrong caption, a broken file, something not like the rest.

What a sample loses depends on its noise level far more than on the picture, so a loss is compared with the mean loss
of all pictures at that level. Levels are `LEVELS` points over [0, 1]; a sample between two counts for both, by its
distance to them. A picture's number is the mean of loss / expected loss over its visits, old visits counting less;
it stands out where that is more than `CUT` robust standard deviations above the median picture (modified z-score,
Iglewicz and Hoaglin 1993).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from library import randomness
from library.train.run_log import Outlier
from library.train.sample_losses import SampleLoss

LEVELS = 16
KEPT = 0.9  # share of what was seen before that an epoch's beginning keeps
CUT = 3.5
LEAST_VISITS = 3  # before that chance decides
LEAST_IMAGES = 8  # fewer have no usual picture to compare with
NORMAL = 1.4826  # standard deviation of a normal law / its median absolute deviation


class LossByImage:
    """Losses of `images` (keys), by picture and noise level."""

    def __init__(self, images: Sequence[str]) -> None:
        self._images = tuple(images)
        self._losses = np.zeros((len(images), LEVELS))  # summed
        self._weights = np.zeros((len(images), LEVELS))  # samples that the sums are of
        self._visits = np.zeros(len(images), dtype=np.int64)
        self._epoch = 0

    def add(self, samples: Iterable[SampleLoss], *, epoch: int) -> None:
        """Take in a step's samples; `epoch` only rises."""
        if epoch > self._epoch:
            self._losses *= KEPT
            self._weights *= KEPT
            self._epoch = epoch
        for image, t, loss in samples:
            place = min(max(t * LEVELS - 0.5, 0.0), LEVELS - 1.0)
            below = min(int(place), LEVELS - 2)
            for level, share in ((below, below + 1 - place), (below + 1, place - below)):
                self._losses[image, level] += share * loss
                self._weights[image, level] += share
            self._visits[image] += 1

    def ratios(self) -> np.ndarray:
        """Mean of loss / expected loss of each picture; NaN for one that was not seen LEAST_VISITS times."""
        weights = self._weights.sum(axis=0)
        expected = np.divide(self._losses.sum(axis=0), weights, out=np.ones(LEVELS), where=weights > 0)
        sums = (self._losses / np.maximum(expected, np.finfo(np.float64).tiny)).sum(axis=1)
        seen = self._visits >= LEAST_VISITS
        ratios = np.full(len(seen), np.nan)
        ratios[seen] = sums[seen] / self._weights[seen].sum(axis=1)
        return ratios

    def outliers(self) -> tuple[Outlier, ...]:
        """Pictures that stand out, furthest first."""
        ratios = self.ratios()
        known = ratios[~np.isnan(ratios)]
        if len(known) < LEAST_IMAGES:
            return ()
        middle = np.median(known)
        spread = NORMAL * float(np.median(np.abs(known - middle)))
        if spread == 0:
            return ()
        scores = (ratios - middle) / spread
        return tuple(
            Outlier(
                image=self._images[number],
                score=float(scores[number]),
                loss=float(ratios[number]),
                visits=int(self._visits[number]),
            )
            for number in np.argsort(-scores, kind="stable")
            if scores[number] > CUT
        )

    def state(self) -> dict[str, Tensor]:
        """What a resume needs."""
        return {
            "images": self._name(),
            "losses": torch.from_numpy(self._losses.copy()),
            "weights": torch.from_numpy(self._weights.copy()),
            "visits": torch.from_numpy(self._visits.copy()),
            "epoch": torch.tensor(self._epoch),
        }

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Take up what `state` gave; of other pictures, nothing."""
        if not torch.equal(state["images"], self._name()):
            return
        self._losses, self._weights = state["losses"].numpy().copy(), state["weights"].numpy().copy()
        self._visits, self._epoch = state["visits"].numpy().copy(), int(state["epoch"])

    def _name(self) -> Tensor:
        """Which pictures, in which order."""
        return torch.frombuffer(bytearray(randomness.digest(*self._images)), dtype=torch.uint8)
