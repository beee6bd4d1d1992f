"""A loss that is not finite ends a run; its state is that of the last good step, and a resumed run is the whole one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flux_train_network import main
from tests.e2e.running import draw_pictures, write_config

FAULTY = "tests.e2e.failing_network"


@pytest.mark.parametrize("ahead", [True, False], ids=["queued ahead", "read at once"])
def test_a_run_goes_on_from_the_step_before(tmp_path: Path, capsys: pytest.CaptureFixture[str], ahead: bool):
    data = tmp_path / "data"
    draw_pictures(data / "3_waves", [(64, 64)] * 4)
    options = {
        "network_module": FAULTY, "lr_scheduler": "cosine", "lr_warmup_steps": 2, "learning_rate": 1e-2,
        "ema_decay": 0.9, "optimizer_args": [f"fused={ahead}"],
    }  # fmt: skip

    def trained(name: str, *, at: int, code: int) -> tuple[dict[str, torch.Tensor], ...]:
        fault = [
            f"{k}={v}" for k, v in {"fault": "nan", "at": at, "rank": 0, "marker": tmp_path / name}.items()
        ]
        config = write_config(
            tmp_path / f"{name}.toml", data, tmp_path / f"{name}-out", **options, network_args=fault
        )
        assert main(["--config_file", str(config), "--resume", "auto"]) == code
        last = capsys.readouterr().err.splitlines()[-1]
        if code == 0:
            return tuple(
                load_file(tmp_path / f"{name}-out" / f"{stem}.safetensors") for stem in ("out", "out-ema")
            )
        state = tmp_path / f"{name}-out" / "out-step00000006-state"
        assert last.startswith("error: step 7: the loss is nan")
        assert last.endswith(f"the state before it is in {state}")
        return trained(name, at=at, code=0)

    (broken, average), (whole, whole_average) = (
        trained("broken", at=7, code=3), trained("whole", at=100, code=0),
    )  # fmt: skip
    assert broken.keys() == whole.keys()
    assert all(torch.equal(broken[name], whole[name]) for name in whole)
    assert average.keys() == whole_average.keys()
    for name, tensor in whole_average.items():
        assert torch.allclose(average[name], tensor, rtol=1e-5, atol=1e-8), name
    assert max(float(tensor.abs().max()) for name, tensor in whole.items() if "lora_up" in name) > 1e-3
