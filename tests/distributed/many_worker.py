"""One rank of several runs, one after the other, in one process: the configs named on the command line.

Started by torchrun, once for all backends, as starting is what takes time. What differs between runs, a backend, is
chosen as the trainer chooses it; the process group is made once.
"""

from __future__ import annotations

import gc
import sys

from rich.console import Console
from torch.distributed import PrefixStore

from library.config.load import load_config
from library.distributed.group import Group
from library.distributed.launch import choose_backend, join, this_process
from library.distributed.precision import DTYPES
from library.errors import TrainingDiverged
from library.train.setup import prepare, train

if __name__ == "__main__":
    gc.freeze()  # each run collects garbage several times; what was imported is none
    world = this_process()
    joined = join(world, None)
    for number, path in enumerate(sys.argv[1:]):
        # Who has waited for what is kept by name, so each run has names of its own.
        group = Group(world, PrefixStore(f"run {number}", joined.store))
        loaded = load_config(["--config_file", path])
        config = loaded.config
        backend = choose_backend(
            config.distributed,
            world,
            lambda group=group: group,
            dtype=DTYPES[config.training.mixed_precision],
            leaves_out_modules=False,
        )
        try:
            train(prepare(loaded, backend, Console(stderr=True)))
        except TrainingDiverged as error:
            sys.stderr.write(f"{path}: {error}\n")
        group.wait("the end of the run")
    joined.close()
