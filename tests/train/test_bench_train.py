"""The measuring tool runs the trainer's own loop; at tiny size here, so that it cannot fall behind the code."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.models.params import FluxParams
from tools.bench_train import flops_per_sample, main


@pytest.mark.parametrize(
    "options",
    [
        ["--resolutions", "128x128", "64x192", "--gradient_accumulation_steps", "2", "--save"],
        [
            "--network_module",
            "lycoris.kohya",
            "--network_args",
            "algo=lokr",
            "factor=4",
            "--gradient_checkpointing",
        ],
        ["--fp8_base", "--mixed_precision", "bf16", "--train_batch_size", "2"],
    ],
    ids=["buckets", "lokr", "fp8_base"],
)
def test_a_tiny_measurement(tmp_path: Path, options: list[str]):
    result = tmp_path / "speed.jsonl"
    common = ["--size", "tiny", "--steps", "2", "--warmup", "1", "--t5xxl_max_token_length", "16"]
    precision = [] if "--mixed_precision" in options else ["--mixed_precision", "no"]
    assert (
        main([*common, *precision, *options, "--json", str(result), "--max_data_loader_n_workers", "0"]) == 0
    )
    (line,) = result.read_text().splitlines()
    measured = json.loads(line)
    assert measured["seconds_per_step"] > 0
    assert measured["images_per_second"] > 0
    assert ("seconds_save_state" in measured) == ("--save" in options)
    first, last = measured["losses"]
    assert first != last, "the network was not updated"


def test_arithmetic_of_the_full_size():
    """74.4 TFLOP forward and 96.6 backward at 1024 pixels and 512 text tokens, counted by hand."""
    assert flops_per_sample(FluxParams(), 4096 + 512) == pytest.approx(171e12, rel=0.01)
