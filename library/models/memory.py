"""Memory of the GPU that nothing uses any more."""

from __future__ import annotations

import gc

import torch


def free_memory() -> None:
    """Give back what an encoder that just went out of use held."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
