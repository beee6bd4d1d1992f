"""FlashAttention's packages: where they may be used, and what is between flash-attn-4 and torch's operators.

Neither can run without a GPU. Whether the operators are given and answered rightly is held with a module of the
package's name that computes the formula, with the parameters and results of flash-attn-4 4.0.0b36.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

import pytest
import torch

from library.errors import EnvironmentUnsupported
from library.models import attention, flash_packages
from library.models.attention import Verdict, begin, kept_verdict, trial
from library.models.flash_packages import PACKAGES, installed, refusal, usable

CPU, GPU = torch.device("cpu"), torch.device("cuda")
without_packages = pytest.mark.skipif(any(map(installed, PACKAGES)), reason="a package is installed here")
FORMULA = """
import torch

def _logits(q, k, softmax_scale):
    return torch.einsum("bqhd,bkhd->bhqk", q, k) * (softmax_scale or q.shape[-1] ** -0.5)

def _flash_attn_fwd(q, k, v, *, softmax_scale=None, causal=False, return_lse=False, out=None):
    assert not causal and return_lse
    logits = _logits(q, k, softmax_scale)
    out.copy_(torch.einsum("bhqk,bkhd->bqhd", logits.softmax(-1), v))
    return out, logits.logsumexp(-1), None, None, None

def _flash_attn_bwd(
    q, k, v, out, dout, lse, softmax_scale=None, causal=False, *, deterministic=False, dq=None, dk=None, dv=None
):
    assert not causal and not deterministic
    scale = softmax_scale or q.shape[-1] ** -0.5
    p = (_logits(q, k, softmax_scale) - lse.unsqueeze(-1)).exp()
    dp = torch.einsum("bqhd,bkhd->bhqk", dout, v)
    ds = p * (dp - (dout * out).sum(-1).transpose(1, 2).unsqueeze(-1)) * scale
    dv.copy_(torch.einsum("bhqk,bqhd->bkhd", p, dout))
    dq.copy_(torch.einsum("bhqk,bkhd->bqhd", ds, k))
    dk.copy_(torch.einsum("bhqk,bqhd->bkhd", ds, q))
    return dq, dk, dv
"""


def install(folder, distribution, version):
    """What a package manager leaves of a package: its name and version."""
    about = folder / f"{distribution.replace('-', '_')}-{version}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: {version}\n")
    importlib.invalidate_caches()


@pytest.fixture
def site(monkeypatch, tmp_path):
    """A folder where packages are installed, first on the path."""
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    return folder


@pytest.fixture
def card(monkeypatch):
    """A GPU of a compute capability."""

    def put(major):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, 0))
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A Card")

    return put


@without_packages
@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_cannot_be_used_is_refused_in_a_sentence(site, card, name):
    def sentence(device, dtype=torch.bfloat16):
        with pytest.raises(EnvironmentUnsupported) as refused:
            begin(name, device=device, dtype=dtype, compiled=False)
        return str(refused.value)

    assert sentence(CPU) == f"attention = {name} needs an NVIDIA GPU: without it, use attention = auto"
    card(8)
    assert "needs a GPU of the kind Hopper" in sentence(GPU)
    assert "A Card" in sentence(GPU)
    card(9)
    assert "bf16 and fp16 only" in sentence(GPU, torch.float32)
    missing = sentence(GPU)
    assert PACKAGES[name].distribution in missing
    assert PACKAGES[name].install in missing
    install(site, PACKAGES[name].distribution, "9.1")
    assert refusal(name, GPU, torch.bfloat16) is None


@without_packages
def test_only_packages_that_are_installed_and_fit_the_card_are_tried(site, card):
    card(9)
    assert usable(GPU, torch.bfloat16) == []
    install(site, "flash-attn-4", "4.0.0b36")
    install(site, "flash_attn_3", "3.0.0")
    assert usable(GPU, torch.bfloat16) == ["flash3", "flash4"]
    assert usable(GPU, torch.float32) == []
    card(12)
    assert usable(GPU, torch.float16) == ["flash4"]


@without_packages
def test_installing_a_package_leads_to_a_new_trial_with_it_at_the_end(monkeypatch, tmp_path, site, card):
    card(9)
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path / "cache"))
    tried = []

    def found(device, dtype, *, compiled, kernels):
        tried.append(kernels)
        return Verdict(dict.fromkeys(kernels, 0.5), {})

    monkeypatch.setattr(attention, "trial", found)

    def runs():
        for _ in range(2):
            kept_verdict(GPU, torch.bfloat16, compiled=True)
        return tried

    assert runs() == [attention.TRIED]
    install(site, "flash-attn-4", "4.0.0b36")
    assert runs()[1:] == [(*attention.TRIED, "flash4")]
    install(site, "nvidia-cutlass-dsl", "4.8.1")
    assert installed("flash4") == "flash4_4.0.0b36_4.8.1"
    assert len(runs()) == 3


@without_packages
@pytest.mark.parametrize("name", PACKAGES)
def test_a_package_that_cannot_be_imported_costs_only_itself(monkeypatch, tmp_path, name):
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path))
    found = trial(CPU, torch.float32, compiled=False, kernels=(name,))
    assert found.seconds == {name: None}
    assert found.faults[name].startswith(f"{PACKAGES[name].distribution} cannot be imported (No module named")
    assert found.fastest == "math"


def test_a_package_without_kernels_is_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "flash_attn_interface", ModuleType("flash_attn_interface"))
    with pytest.raises(EnvironmentUnsupported, match=r"flash_attn_3 cannot be imported .*: install it again"):
        flash_packages.activate("flash3")


@pytest.fixture
def taken(site):
    """flash-attn-4 behind torch's operators for the CPU, which have no kernel of torch's own there."""
    package = site / "flash_attn" / "cute"
    package.mkdir(parents=True)
    for folder in (package.parent, package):
        (folder / "__init__.py").touch()
    (package / "interface.py").write_text(FORMULA)
    importlib.invalidate_caches()
    held = flash_packages.take_over("CPU")
    yield held
    held.remove()
    for module in [module for module in sys.modules if module.partition(".")[0] == "flash_attn"]:
        del sys.modules[module]


def _operator(q, k, v, mask):
    out = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
    return out.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("layout", ["by token", "by head"])
def test_output_and_gradients_go_through_the_package(taken, compiled, layout):
    inputs = attention._inputs(CPU, torch.float32, heads=2, length=96)
    if layout == "by head":
        inputs = [tensor.detach().contiguous().requires_grad_() for tensor in inputs]
    # Compiled code takes the strides of results from torch's own description of the operators.
    function = torch.compile(_operator, backend="aot_eager", dynamic=False) if compiled else _operator
    got = attention._differentiate(function, inputs, None)
    wanted = attention._differentiate(attention._formula, inputs, None)
    for result, expected in zip(got, wanted, strict=True):
        torch.testing.assert_close(result, expected)


def test_strides_are_those_that_compiled_code_was_told(taken):
    inputs = [tensor.detach() for tensor in attention._inputs(CPU, torch.float32, heads=2, length=96)]
    described = [tensor.to("meta") for tensor in inputs]
    forward = torch.ops.aten._scaled_dot_product_flash_attention
    backward = torch.ops.aten._scaled_dot_product_flash_attention_backward
    answers = []
    for q, k, v in (inputs, described):
        out, logsumexp, *rest = forward(q, k, v)
        empty = torch.empty(0, device=q.device)
        grads = backward(
            torch.ones_like(out), q, k, v, out, logsumexp, empty, empty, *rest[2:4], 0.0, False, *rest[4:6]
        )
        answers.append([(tensor.shape, tensor.stride(), tensor.dtype) for tensor in (out, logsumexp, *grads)])
    assert answers[0] == answers[1]


def test_dropout_is_refused(taken):
    q, k, v = attention._inputs(CPU, torch.float32, heads=2, length=16)
    with pytest.raises(NotImplementedError, match="no dropout"):
        torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.5)


def test_what_was_taken_over_is_given_back(taken):
    q, k, v = attention._inputs(CPU, torch.float32, heads=2, length=16)
    torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)
    taken.remove()
    with pytest.raises(NotImplementedError):
        torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)


def test_compiled_kernels_are_kept_in_the_users_cache_folder(monkeypatch, tmp_path):
    for name in ("ENABLED", "DIR"):
        monkeypatch.setenv(f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}", "")
        monkeypatch.delenv(f"FLASH_ATTENTION_CUTE_DSL_CACHE_{name}")
    monkeypatch.setenv("POLYRANK_CACHE", str(tmp_path))
    flash_packages._keep_compiled_kernels()
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"] == "1"
    assert os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"] == str(tmp_path / "flash4")
    assert (tmp_path / "flash4").is_dir()
