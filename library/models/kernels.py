"""GPU kernels of our own, each trusted on a card only after it has computed there what its formula says."""

from __future__ import annotations

import importlib
import importlib.util
import logging
from collections.abc import Callable, Sequence
from types import ModuleType

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

_TOLERANCE = 0.02  # of the largest number: a few roundings to 16 bits; a wrong kernel is off by all of it


def trusted(name: str, check: Callable[[ModuleType], Sequence[tuple[Tensor, Tensor]]]) -> ModuleType | None:
    """The module of kernels, or None where there is no compiler of them or `check`'s pairs (found, wanted) differ.

    A line says so in the second case: the run goes on by the formulas.
    """
    if importlib.util.find_spec("triton") is None:
        return None
    try:
        kernels = importlib.import_module(name)
        distances = [
            float((found.float() - wanted.float()).abs().max() / wanted.float().abs().max())
            for found, wanted in check(kernels)
        ]
        # NaN is neither less nor more.
        wrong = [distance for distance in distances if not distance < _TOLERANCE]
        fault = f"it is off by {max(wrong):.2g} of the largest number" if wrong else ""
    except Exception as error:  # noqa: BLE001 - whatever a compiler of kernels raises, there are the formulas
        torch.cuda.synchronize()
        fault = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    if fault:
        logger.warning("%s does not work on this GPU, so formulas are computed instead: %s", name, fault)
        return None
    return kernels
