"""The trial of attention kernels: what is right passes, what is wrong, crashes or hangs is refused."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.profiler import profile

from library.models import attention
from library.models.attention import Verdict, begin, check, main, settle, trial, use

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
        "import os, sys, time\n"
        "for name in sys.argv[4:]:\n"
        "    if name == 'cudnn': os.abort()\n"
        "    if name == 'flash': sys.exit('dq is off by 0.9 of the largest value')\n"
        "    if name == 'slow': time.sleep(60)\n"
        "    print(name, 0.25, flush=True)\n"
    )
    monkeypatch.setattr(attention, "TRIAL_SECONDS", 2)
    found = trial(
        CPU, torch.float32, compiled=False, kernels=("first", "cudnn", "flash", "second", "slow", "efficient"),
        command=(sys.executable, "-c", program),
    )  # fmt: skip
    assert found.seconds == {
        "first": 0.25, "cudnn": None, "flash": None, "second": 0.25, "slow": None, "efficient": 0.25
    }  # fmt: skip
    assert found.faults["flash"] == "dq is off by 0.9 of the largest value"
    assert "ended its process" in found.faults["cudnn"]
    assert "no answer" in found.faults["slow"]
    assert found.fastest in ("first", "second", "efficient")


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import sys; sys.stderr.write('CUDA out of memory\\n'); sys.exit(3)", "CUDA out of memory"),
        ("import os; os.kill(os.getpid(), 15)", "signal 15"),
        ("import os; os.kill(os.getpid(), 9)", "signal 9"),
    ],
    ids=["no memory", "stopped", "killed"],
)
def test_a_disturbed_trial_judges_no_kernel_and_is_not_kept(monkeypatch, tmp_path, caplog, program, reason):
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    command = (sys.executable, "-c", program)
    monkeypatch.setattr(attention, "trial", partial(trial, command=command))
    device = torch.device("cuda")
    assert (
        settle("auto", begin("auto", device=device, dtype=torch.bfloat16, compiled=False), device=device)
        == "auto"
    )
    assert reason in caplog.text
    assert list(tmp_path.iterdir()) == []


def test_no_memory_is_told_from_a_fault(monkeypatch, capsys):
    def full(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    monkeypatch.setattr(attention, "check", full)
    assert main(["cpu", "float32", "eager", "math"]) == attention.NO_MEMORY
    assert "Tried to allocate" in capsys.readouterr().err


def test_kernels_are_not_blamed_for_a_compiler_that_does_not_work(monkeypatch):
    def broken(graph, inputs):
        raise RuntimeError("Cannot find a working triton installation")

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=broken))
    torch._dynamo.reset()
    check("math", CPU, torch.float32, compiled=True, length=96)


def test_what_was_compiled_for_one_kernel_is_not_taken_for_the_next(monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    for name, operator in (("flash", "flash_attention_for_cpu"), ("math", "attention_math")):
        with torch.compiler.config.patch(cache_key_tag=""), profile() as seen:
            check(name, CPU, torch.float32, compiled=True, length=96)
        assert any(event.key.endswith(operator) for event in seen.key_averages()), name


def test_the_fastest_right_kernel_wins():
    assert Verdict({"cudnn": 0.1, "flash": 0.2}, {}).fastest == "cudnn"
    assert Verdict({"cudnn": None, "flash": 0.2}, {"cudnn": "wrong"}).fastest == "flash"
    assert Verdict({"cudnn": None}, {}).fastest == "math"


def test_without_a_gpu_there_is_nothing_to_try():
    assert (
        settle("auto", begin("auto", device=CPU, dtype=torch.bfloat16, compiled=False), device=CPU) == "math"
    )


def test_a_run_in_float32_waits_for_no_trial_unless_it_asks_for_a_kernel(monkeypatch):
    tried = []
    monkeypatch.setattr(attention, "kept_verdict", lambda *arguments, **options: tried.append(arguments))
    for wanted in ("auto", "flash"):
        coming = begin(wanted, device=torch.device("cuda"), dtype=torch.float32, compiled=True)
        assert (coming is None) == (wanted == "auto")
    assert len(tried) == 1


def test_a_verdict_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")
    tried = []

    def once(device, dtype, *, compiled, kernels):
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


def test_the_process_of_a_trial_gives_seconds_or_a_reason(monkeypatch, capsys):
    monkeypatch.setattr(attention, "LENGTH", 96)
    monkeypatch.setattr(attention, "HEADS", 2)
    assert main(["cpu", "float32", "eager", "math", "flash", "cudnn", "efficient"]) == 1
    said = capsys.readouterr()
    assert [line.split()[0] for line in said.out.splitlines()] == ["math", "flash"]
    assert all(float(line.split()[1]) > 0 for line in said.out.splitlines())
    assert said.err.strip()


@pytest.fixture
def switches():
    """torch's switches, as they were before the test."""
    flags = torch.backends.cuda
    before = [
        flags.cudnn_sdp_enabled(), flags.flash_sdp_enabled(), flags.mem_efficient_sdp_enabled(),
        flags.math_sdp_enabled(),
    ]  # fmt: skip
    order = torch._C._get_sdp_priority_order()
    yield flags
    for switch, state in zip(
        (flags.enable_cudnn_sdp, flags.enable_flash_sdp, flags.enable_mem_efficient_sdp, flags.enable_math_sdp),
        before, strict=True,
    ):  # fmt: skip
        switch(state)
    torch._C._set_sdp_priority_order(order)


def test_what_failed_is_off_and_the_chosen_one_comes_first(switches):
    order = torch._C._get_sdp_priority_order()
    use("efficient", Verdict({"cudnn": None, "flash": 0.2, "efficient": 0.3}, {}))
    assert not switches.cudnn_sdp_enabled()
    assert switches.flash_sdp_enabled()
    first = torch._C._get_sdp_priority_order()
    assert first[:2] == [int(attention.BACKENDS["efficient"]), int(attention.BACKENDS["flash"])]
    assert sorted(first) == sorted(order)


def test_a_package_that_is_not_chosen_does_not_keep_torchs_own_flash_on(switches):
    use("cudnn", Verdict({"cudnn": 0.1, "flash": None, "efficient": 0.3, "flash4": 0.2}, {}))
    assert not switches.flash_sdp_enabled()
    assert torch._C._get_sdp_priority_order()[1] == int(attention.BACKENDS["efficient"])


def test_the_line_about_the_choice_says_what_was_measured(switches, caplog):
    coming: Future[Verdict] = Future()
    coming.set_result(
        Verdict({"cudnn": 0.0069, "efficient": 0.015, "flash4": None}, {"flash4": "dq is off by 0.9"})
    )
    with caplog.at_level("INFO", logger="library"):
        assert settle("auto", coming, device=CPU) == "cudnn"
    assert "attention: cudnn (cudnn 6.9 ms, efficient 15.0 ms); flash4: dq is off by 0.9" in caplog.text


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_choice_holds_from_the_first_attention_on():
    """In a process of its own: torch sets its order when it first chooses."""
    program = (
        "import torch; from concurrent.futures import Future; from library.models import attention as a\n"
        "coming = Future(); coming.set_result(a.Verdict({'cudnn': 0.1, 'efficient': 0.2}, {}))\n"
        "a.settle('efficient', coming, device=torch.device('cuda'))\n"
        "x = torch.zeros(1, 2, 64, 64, device='cuda', dtype=torch.bfloat16)\n"
        "print(torch._fused_sdp_choice(x, x, x))"
    )
    root = Path(attention.__file__).resolve().parents[2]
    run = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=root
    )
    assert int(run.stdout) == int(attention.BACKENDS["efficient"])
