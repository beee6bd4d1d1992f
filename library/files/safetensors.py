"""Reading and writing safetensors files: headers alone, single tensors, whole files.

A header is read without touching a tensor, so a 24 GB checkpoint is understood in milliseconds; a tensor is
read straight to its device and dtype, so host memory never holds a second copy. What cannot be read is a
`CheckpointError` whose sentence says what the file is instead (a download that failed, a pickle, a cut-off
copy). Which model a file holds is decided in `library.models.identify`.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import difflib
import json
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

from library.errors import CheckpointError
from library.files.atomic import replacing

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

# What save_precision names; None: as it is
SAVE_DTYPES: dict[str | None, torch.dtype | None] = {
    None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16,
}  # fmt: skip
_LENGTH_BYTES = 8
_LARGEST_HEADER = 100_000_000  # the format's own limit

# What people store under the name .safetensors, by how the file begins.
_IMPOSTORS: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a git-lfs pointer, not the file itself; fetch it with `git lfs pull`"),
    (b"<!doctype html", "is a web page, probably an error page saved by a download; download the file again"),
    (b"<html", "is a web page, probably an error page saved by a download; download the file again"),
    (b"pk\x03\x04", "is a PyTorch pickle (.ckpt/.pt); convert it to safetensors first"),
    (b"\x80\x02", "is a PyTorch pickle (.ckpt/.pt); convert it to safetensors first"),
    (b"gguf", "is a GGUF file; use the safetensors version of the model"),
    (b'{"error', "is an error message saved by a download; download the file again"),
)


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header says of one tensor."""

    dtype: str  # the format's name, a key of `DTYPES`
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    end: int

    @property
    def torch_dtype(self) -> torch.dtype:
        """The tensor's torch dtype."""
        return DTYPES[self.dtype]


@dataclass(frozen=True, slots=True)
class Header:
    """Everything a safetensors file holds but the numbers."""

    path: Path
    tensors: Mapping[str, TensorInfo]  # in the file's order
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read the header of the safetensors file at `path`.

    Raises:
        CheckpointError: missing, cut off, or not a safetensors file; the sentence says which and what to do.
    """
    _require_file(path)
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(_LENGTH_BYTES)
        length = struct.unpack("<Q", start)[0] if len(start) == _LENGTH_BYTES else 0
        body = file.read(length) if 2 <= length <= _LARGEST_HEADER else b""
    content = _parse(body) if len(body) == length else None
    if content is None:
        raise CheckpointError(f"{path} {_what_it_is(path, size, length, len(body))}.")
    metadata = content.pop("__metadata__", None) or {}
    offset = _LENGTH_BYTES + length
    tensors = {name: _tensor_info(path, name, value, offset) for name, value in content.items()}
    needed = max((info.end for info in tensors.values()), default=offset)
    if needed > size:
        raise CheckpointError(
            f"{path} is cut off: it should have {needed} bytes and has {size}; copy or download it again."
        )
    return Header(path=path, tensors=tensors, metadata={str(k): str(v) for k, v in metadata.items()})


class Reader:
    """Tensors of one file, one at a time; a context manager.

    With `mmap` the file is mapped and the page cache is the only host copy; without, every tensor is read
    with plain file I/O, which is faster on network disks.
    """

    def __init__(self, header: Header, *, mmap: bool = True) -> None:
        self.header = header
        self._mapped = safe_open(header.path, framework="pt", device="cpu") if mmap else None
        self._file = None if mmap else header.path.open("rb")

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
        self._mapped = None

    def read(self, name: str) -> Tensor:
        """The tensor `name` on the CPU in its stored dtype; if mapped, it shares the file's pages."""
        if self._file is None:
            assert self._mapped is not None, "read after close"
            tensor: Tensor = self._mapped.get_tensor(name)  # type: ignore[no-untyped-call]
            return tensor
        info = self.header.tensors[name]
        data = torch.empty(info.end - info.start, dtype=torch.uint8)
        self._file.seek(info.start)
        if data.numel():
            count = self._file.readinto(data.numpy().data)
            if count != data.numel():
                raise CheckpointError(f"{self.header.path} changed while it was read; try again.")
        return data.view(info.torch_dtype).reshape(info.shape)


def save_file(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` to `path` whole, by way of a temporary file and a rename.

    Tensors are moved to the CPU and made contiguous; views of one storage are written as separate tensors. Raises
    OSError, as any other writing does.
    """
    ready = {name: tensor.detach().to("cpu").contiguous() for name, tensor in tensors.items()}
    storages: set[int] = set()
    for name, tensor in ready.items():
        address = tensor.untyped_storage().data_ptr()
        if tensor.numel() and address in storages:
            ready[name] = tensor.clone()
        storages.add(address)
    with replacing(path) as temporary:
        try:
            safetensors.torch.save_file(ready, temporary, metadata=dict(metadata) if metadata else None)
        except safetensors.SafetensorError as error:
            code = re.search(r"\(os error (\d+)\)", str(error))
            if code is None:
                raise
            raise OSError(int(code[1]), os.strerror(int(code[1]))) from error


def load_file(path: Path) -> dict[str, Tensor]:
    """All tensors of `path` on the CPU, mapped, in their stored dtypes. For small files."""
    with Reader(read_header(path)) as reader:
        return {name: reader.read(name) for name in reader.header.tensors}


def similar_name(path: Path) -> str:
    """A sentence, after a space, with the file beside `path` whose name is closest; "" if none is close."""
    if not path.parent.is_dir():
        return f" Its folder {path.parent} does not exist either."
    names = [entry.name for entry in path.parent.iterdir()]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.6)
    return f" Did you mean {path.parent / close[0]}?" if close else ""


def _require_file(path: Path) -> None:
    if path.is_dir():
        raise CheckpointError(f"{path} is a folder, and a safetensors file is expected.")
    if not path.exists():
        raise CheckpointError(f"{path} does not exist.{similar_name(path)}")


def _parse(body: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(body)
    except ValueError:  # includes text that is not UTF-8
        return None
    return content if isinstance(content, dict) else None


def _tensor_info(path: Path, name: str, value: object, offset: int) -> TensorInfo:
    try:
        if not isinstance(value, dict):
            raise TypeError
        start, end = value["data_offsets"]
        info = TensorInfo(
            str(value["dtype"]), tuple(int(n) for n in value["shape"]), offset + start, offset + end
        )
    except (KeyError, TypeError, ValueError):
        raise CheckpointError(f"{path} has a damaged header (entry {name!r}); download it again.") from None
    if info.dtype not in DTYPES:
        raise CheckpointError(f"{path} holds {name} as {info.dtype}, a number format that is not supported.")
    return info


def _what_it_is(path: Path, size: int, length: int, available: int) -> str:
    if size == 0:
        return "is empty; download or copy it again"
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    for beginning, sentence in _IMPOSTORS:
        if start.startswith(beginning):
            return sentence
    if (
        2 <= length <= _LARGEST_HEADER
        and available < length
        and start[_LENGTH_BYTES - 1 :].lstrip(b"\x00")[:1] == b"{"
    ):
        return f"is cut off in its header ({size} bytes); copy or download it again"
    return "is not a safetensors file"
