"""One rank of a run whose trained parameters are written per rank, for comparison. Started by torchrun or plain."""

from __future__ import annotations

import sys
from pathlib import Path

from rich.console import Console
from safetensors.torch import save_file

from library.config.load import load_config
from library.train.setup import connected, prepare, train

if __name__ == "__main__":
    loaded = load_config(["--config_file", sys.argv[1]])
    with connected(loaded.config) as backend:
        trained = train(prepare(loaded, backend, Console(stderr=True)))
        own = {
            name: parameter.detach().clone() for name, parameter in trained.network.module.named_parameters()
        }
        save_file(own, Path(sys.argv[2]) / f"rank{backend.world.rank}.safetensors")
