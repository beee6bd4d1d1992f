"""Two ranks that add up kept gradients after the backward pass, as recorded steps need it, against torch's DDP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

from safetensors.torch import load_file

from library.distributed import ddp
from library.distributed.ddp import DdpBackend
from library.train import graphs
from tests.distributed.ranks import start
from tests.e2e.running import draw_pictures, write_config

STEPS = {
    "train_batch_size": 1, "gradient_accumulation_steps": 2, "max_train_epochs": 2, "learning_rate": 1e-2,
    "save_state_on_train_end": True, "cache_latents_to_disk": True,
}  # fmt: skip


@contextmanager
def kept(marker: Path) -> Iterator[None]:
    """Within a rank: its steps are to be recordable, as on a GPU, and none is recorded. Notes what sums there were."""
    sums = 0
    wrap = DdpBackend.wrap

    def wrapped(self, module, optimizer, *, recordable=False):
        nonlocal sums
        made = wrap(self, module, optimizer, recordable=recordable)
        add = self._kept.sum_over_ranks

        def counted() -> None:
            nonlocal sums
            sums += 1
            add()

        self._kept.sum_over_ranks = counted
        return made

    with (
        patch.object(graphs, "wanted", lambda *_, **__: True),
        patch.object(graphs, "ORDINARY", 10**9),
        patch.object(ddp, "SOON", float("inf")),  # however busy this machine is
        patch.object(DdpBackend, "wrap", wrapped),
    ):
        yield
    marker.write_text(str(sums), encoding="utf-8")


def test_sums_of_kept_gradients_are_those_of_ddp(tmp_path: Path):
    data = tmp_path / "data"
    draw_pictures(data / "1_same", [(64, 64)] * 4)
    draw_pictures(data / "1_wide", [(96, 64)] * 3)
    losses, weights = {}, {}
    marker = tmp_path / "sums"
    for name, around in (("kept", partial(kept, marker)), ("ddp", None)):
        config = write_config(tmp_path / f"{name}.toml", data, tmp_path / name, **STEPS)
        given = {} if around is None else {"around": around}
        running = start(["--config_file", str(config)], ranks=2, screens=tmp_path / "said" / name, **given)
        assert running.ended() == [0, 0], running.said()
        state = json.loads((tmp_path / name / "out-state" / "train_state.json").read_text(encoding="utf-8"))
        # Seven pictures for two ranks of two micro-steps: a step of four and one of three in each epoch.
        assert (state["step"], state["samples_seen"]) == (4, 14)
        losses[name], weights[name] = state["losses"], load_file(tmp_path / name / "out.safetensors")
    assert marker.read_text(encoding="utf-8") == "4"  # one a step
    assert max(abs(a - b) for a, b in zip(losses["kept"], losses["ddp"], strict=True)) < 1e-6
    assert weights["kept"].keys() == weights["ddp"].keys()
    for key, weight in weights["ddp"].items():
        assert float((weights["kept"][key] - weight).abs().max()) < 1e-6, key
    assert max(float(w.abs().max()) for key, w in weights["ddp"].items() if "lora_up" in key) > 1e-3
