"""What the system, safetensors and torch.save raise when a file cannot be written, as one error of ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from library.errors import WriteFailed

# What is in the RuntimeError of torch.save when it cannot write.
_TORCH_SAVE = ("PytorchStreamWriter", "inline_container")


@contextmanager
def refusals_named(path: Path) -> Iterator[None]:
    """Surround the writing of `path`: a disk that refuses becomes `WriteFailed`."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in _TORCH_SAVE):
            raise
        why = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise WriteFailed(f"{path} could not be written ({why}); is the disk full?") from error
