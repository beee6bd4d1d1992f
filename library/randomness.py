"""Randomness as a pure function of what is drawn, never of when, where or by whom.

Every draw is keyed by (seed, sample, visit, purpose): the run's seed, the sample's stable name, how often it has
been visited, and what the number is for. The key addresses a counter-based generator (Philox-4x64, Salmon et al.
2011), so one GPU with batch 8, eight GPUs with batch 1 and a resumed run draw the same numbers, and adding an
image to a dataset changes no draw of another one.
"""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import numpy as np


class Visit(NamedTuple):
    """One visit of one sample: the only thing, besides the seed, that a random decision may depend on."""

    sample: str  # stable name of the sample, see `ImageRecord.key`
    number: int  # 0, 1, 2, ...: epoch * repeats + repeat


def digest(*parts: object, size: int = 16) -> bytes:
    """Hash of the parts' text, `size` bytes long; ("ab", "c") and ("a", "bc") differ."""
    state = hashlib.blake2b(digest_size=size)
    for part in parts:
        data = str(part).encode("utf-8", "surrogatepass")
        state.update(len(data).to_bytes(8, "little") + data)
    return state.digest()


def integer(*parts: object, bits: int = 63) -> int:
    """A non-negative integer of at most `bits` bits made from the parts, to seed other generators."""
    return int.from_bytes(digest(*parts), "little") >> (128 - bits)


def generator(seed: int, visit: Visit, purpose: str) -> np.random.Generator:
    """The generator of one purpose ("noise", "timestep", "flip", ...) in one visit of one sample."""
    key = np.frombuffer(digest(seed, visit.sample, visit.number, purpose), dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key))
