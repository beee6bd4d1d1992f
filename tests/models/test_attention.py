"""The trial of attention kernels: what is right passes, what is wrong, crashes or hangs is refused."""

from __future__ import annotations

import sys

import pytest
import torch

from library.models import attention
from library.models.attention import Verdict, check, settle, trial

CPU = torch.device("cpu")


@pytest.mark.parametrize("name", ["math", "flash"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_torchs_own_kernels_pass(name, dtype):
    check(name, CPU, dtype, compiled=False, length=96)


@pytest.mark.parametrize("fault", ["output", "gradient"])
def test_a_wrong_kernel_is_found_out(monkeypatch, fault):
    real = attention._attend

    def wrong(q, k, v, mask):
        out = real(q, k, v, mask)
        return out * 1.1 if fault == "output" else out + (k - k.detach()).transpose(1, 2).flatten(2)

    monkeypatch.setattr(attention, "_attend", wrong)
    with pytest.raises(RuntimeError, match="output" if fault == "output" else "dk"):
        check("math", CPU, torch.float32, compiled=False, length=96)


def test_a_kernel_that_ignores_the_mask_is_found_out(monkeypatch):
    real = attention._attend
    monkeypatch.setattr(attention, "_attend", lambda q, k, v, mask: real(q, k, v, None))
    with pytest.raises(RuntimeError, match="output is off"):
        check("math", CPU, torch.float32, compiled=False, length=96)


def test_a_crash_a_complaint_and_an_answer(monkeypatch):
    program = (
        "import os, sys\n"
        "name = sys.argv[1]\n"
        "print('warming up')\n"
        "if name == 'cudnn': os.abort()\n"
        "if name == 'flash': sys.exit('dq is off by 0.9 of the largest value')\n"
        "if name == 'slow': import time; time.sleep(60)\n"
        "print(0.25)\n"
    )
    monkeypatch.setattr(attention, "TRIAL_SECONDS", 2)
    found = trial(
        CPU, torch.float32, compiled=False, kernels=("cudnn", "flash", "slow", "efficient"),
        command=(sys.executable, "-c", program),
    )  # fmt: skip
    assert found.seconds == {"cudnn": None, "flash": None, "slow": None, "efficient": 0.25}
    assert found.faults["flash"] == "dq is off by 0.9 of the largest value"
    assert "ended its process" in found.faults["cudnn"]
    assert "no answer" in found.faults["slow"]
    assert found.fastest == "efficient"


def test_the_fastest_right_kernel_wins():
    assert Verdict({"cudnn": 0.1, "flash": 0.2}, {}).fastest == "cudnn"
    assert Verdict({"cudnn": None, "flash": 0.2}, {"cudnn": "wrong"}).fastest == "flash"
    assert Verdict({"cudnn": None}, {}).fastest == "math"


def test_without_a_gpu_there_is_nothing_to_try():
    assert settle("auto", device=CPU, dtype=torch.float32, compiled=False) == "math"


def test_a_verdict_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    tried = []

    def once(device, dtype, *, compiled):
        tried.append(dtype)
        return Verdict({"flash": 0.5, "cudnn": None}, {"cudnn": "wrong"})

    monkeypatch.setattr(attention, "trial", once)
    first = attention.kept_verdict(CPU, torch.bfloat16, compiled=True)
    assert attention.kept_verdict(CPU, torch.bfloat16, compiled=True) == first
    assert tried == [torch.bfloat16]
    (file,) = (tmp_path / "attention").iterdir()
    file.write_text("{")  # half a file of an older version
    attention.kept_verdict(CPU, torch.bfloat16, compiled=True)
    attention.kept_verdict(CPU, torch.float16, compiled=True)
    assert len(tried) == 3
