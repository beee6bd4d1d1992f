"""Which kernels of our own are trusted; the module of kernels is any that can be imported."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from library.models.kernels import trusted

NAN = float("nan")


@pytest.mark.parametrize(
    ("found", "said"),
    [((1.0, 1.0), None), ((1.0, 1.5), "off by 0.5"), ((1.0, NAN), "off by nan"), ((NAN, 1.0), "off by nan")],
)
def test_a_kernel_is_trusted_if_all_that_it_computes_is_right(found, said, monkeypatch, our_warnings):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    one = torch.ones(1)
    made = trusted("math", lambda kernels: [(one * number, one) for number in found])
    assert (made is not None) == (said is None)
    assert not said or said in "".join(our_warnings)
