"""Hashes by which other programs know a model file.

`sshs_*` are written into adapter files by Kohya's trainer and read by its tools; the short hash names base
models in the web interfaces. Formulas as in sd-scripts `library/train_util.py`, checked against its output.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
from torch import Tensor

_LEGACY_OFFSET = 0x100000
_LEGACY_LENGTH = 0x10000
_CHUNK = 1 << 22


class AdapterHashes(NamedTuple):
    """Values of the metadata entries `sshs_model_hash` and `sshs_legacy_hash`."""

    model: str  # 64 hex digits
    legacy: str  # 8 hex digits


def adapter_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> AdapterHashes:
    """Hashes of an adapter as if it were saved with only the `ss_*` entries of `metadata`.

    Entries that people edit later (titles, descriptions) do not count, so editing them leaves the hashes
    true.
    """
    stable = {name: value for name, value in metadata.items() if name.startswith("ss_")}
    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    data = safetensors.torch.save(ready, stable)
    header = 8 + struct.unpack("<Q", data[:8])[0]
    legacy = hashlib.sha256(data[_LEGACY_OFFSET : _LEGACY_OFFSET + _LEGACY_LENGTH]).hexdigest()
    return AdapterHashes(hashlib.sha256(memoryview(data)[header:]).hexdigest(), legacy[:8])


def short_hash(path: Path) -> str:
    """First 8 hex digits of the SHA-256 of 64 KiB at offset 1 MiB: `ss_sd_model_hash`."""
    with path.open("rb") as file:
        file.seek(_LEGACY_OFFSET)
        return hashlib.sha256(file.read(_LEGACY_LENGTH)).hexdigest()[:8]


def file_sha256(path: Path) -> str:
    """SHA-256 of the whole file, in hex: `ss_new_sd_model_hash`. Reads all of it: about 1 s for 2 GB."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


def sampled_hash(path: Path) -> str:
    """Hash of a file's length and of 64 KiB at its start, middle and end: tells two models apart in milliseconds."""
    size = path.stat().st_size
    state = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for offset in (0, size // 2, max(0, size - _LEGACY_LENGTH)):
            file.seek(offset)
            state.update(file.read(_LEGACY_LENGTH))
    return state.hexdigest()
