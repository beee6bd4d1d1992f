"""networks.lora_flux with a fault: a plug-in whose network_args say how, at which step and on which rank it fails.

The fault happens once: the file `marker` says that it has.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import ConfigError
from networks import lora_flux

create_network_from_weights = lora_flux.create_network_from_weights


def create_network(*models: Any, fault: str, at: str, rank: str, marker: str, **arguments: Any) -> nn.Module:
    network = lora_flux.create_network(*models, **arguments)
    transformer, steps = models[-1], 0

    def on_step_start(_text_encoders: object, _transformer: object) -> None:
        nonlocal steps
        steps += 1
        if steps == int(at) and rank == os.environ.get("RANK", "0") and not Path(marker).exists():
            Path(marker).write_text(str(os.getpid()), encoding="utf-8")
            FAULTS[fault](transformer)

    network.on_step_start = on_step_start
    return network


def _kill(_transformer: nn.Module) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _memory(_transformer: nn.Module) -> None:
    raise torch.OutOfMemoryError(
        "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 24 GiB"
    )


def _config(_transformer: nn.Module) -> None:
    raise ConfigError("network_args: this rank alone has something against it")


def _bug(_transformer: nn.Module) -> None:
    raise KeyError("nobody thought of this")


def _stuck(_transformer: nn.Module) -> None:
    signal.pause()


def _stop(_transformer: nn.Module) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def _nan(transformer: nn.Module) -> None:
    def spoil(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor:
        handle.remove()
        return output * float("nan")

    handle = transformer.register_forward_hook(spoil)


FAULTS = {
    "kill": _kill, "memory": _memory, "config": _config, "bug": _bug, "stuck": _stuck, "stop": _stop, "nan": _nan,
}  # fmt: skip
