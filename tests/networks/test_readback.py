"""What is said of a saved file: good ones of every kind, and each fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks.readback import read_back

KOHYA = Path(__file__).resolve().parent.parent / "data" / "networks" / "kohya_lora_tiny.safetensors"
LAYER = "lora_unet_single_blocks_0_linear1"
UP = tuple(load_file(KOHYA)[f"{LAYER}.lora_up.weight"].shape)


def changed(folder: Path, **tensors: Tensor | None) -> Path:
    """The reference's file with leaves of one layer replaced, added or (None) taken out; dots are written `__`."""
    content = load_file(KOHYA)
    for leaf, tensor in tensors.items():
        key = f"{LAYER}.{leaf.replace('__', '.')}"
        content.pop(key, None)
        if tensor is not None:
            content[key] = tensor
    save_file(content, folder / "changed.safetensors")
    return folder / "changed.safetensors"


def test_a_file_of_the_reference_is_whole():
    report = read_back(KOHYA)
    assert report.problems == ()
    assert report.num_layers == len({key.split(".")[0] for key in load_file(KOHYA)})
    assert report.num_silent == 0
    assert report.readers == "ComfyUI, Forge and diffusers"


@pytest.mark.parametrize(
    ("tensors", "problem"),
    [
        ({"lora_up__weight": torch.full(UP, float("nan"))}, "numbers that are not finite"),
        ({"lora_up__weight": torch.ones(UP[0], UP[1] + 1)}, "shapes do not fit"),
        ({"lora_up__weight": None}, "no other program loads"),
        ({"on_input": torch.ones(1)}, "no other program loads"),
    ],
)
def test_each_fault_names_its_layer(tmp_path: Path, tensors: dict[str, Tensor], problem: str):
    (found,) = read_back(changed(tmp_path, **tensors)).problems
    assert problem in found
    assert LAYER in found


def test_a_silent_layer_is_counted_and_a_silent_file_is_a_problem(tmp_path: Path):
    up = load_file(KOHYA)[f"{LAYER}.lora_up.weight"]
    report = read_back(changed(tmp_path, lora_up__weight=torch.zeros_like(up)))
    assert (report.num_silent, report.problems) == (1, ())
    silent = {k: torch.zeros_like(t) if "lora_up" in k else t for k, t in load_file(KOHYA).items()}
    save_file(silent, tmp_path / "silent.safetensors")
    assert read_back(tmp_path / "silent.safetensors").problems == (
        "no layer changes anything: every product is zero",
    )


def test_names_that_follow_a_library_s_paths_are_noticed(tmp_path: Path):
    """transformers 5 dropped the level `text_model`, and with it went the names that others know."""
    content = {
        f"lora_te1_encoder_layers_{i}_mlp_fc1.{leaf}": torch.ones(2, 2)
        for i in (0, 1)
        for leaf in ("lora_up.weight", "lora_down.weight")
    }
    save_file(content, tmp_path / "text.safetensors")
    (problem,) = read_back(tmp_path / "text.safetensors").problems
    assert problem == "lora_te1_encoder_layers_0_mlp_fc1 and 1 more has a name that no other program knows"


def test_diffusers_is_not_promised_what_it_drops(tmp_path: Path):
    for name in ("lora_unet_img_in", "lora_te3_encoder_block_0_layer_0_SelfAttention_q"):
        content = {f"{name}.{leaf}": torch.ones(2, 2) for leaf in ("lora_up.weight", "lora_down.weight")}
        save_file(content, tmp_path / "one.safetensors")
        report = read_back(tmp_path / "one.safetensors")
        assert (report.problems, report.readers) == ((), "ComfyUI and Forge")
