"""The measuring tools at tiny size, so that they cannot fall behind the code they measure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tools import bench_cache, bench_numerics, bench_start, bench_train

TINY = ["--size", "tiny", "--t5xxl_max_token_length", "16", "--max_data_loader_n_workers", "0"]


def results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def test_caching_is_held_against_the_encoders_alone(tmp_path):
    file = tmp_path / "cache.jsonl"
    pictures = [
        "--picture",
        "96x64",
        "--resolution",
        "64,64",
        "--min_bucket_reso",
        "32",
        "--vae_batch_size",
        "2",
    ]
    given = [
        *TINY,
        *pictures,
        "--mixed_precision",
        "no",
        "--images",
        "9",
        "--repeats",
        "1",
        "--json",
        str(file),
    ]
    assert bench_cache.main(given) == 0
    (found,) = results(file)
    for what in ("latents", "text"):
        numbers = found[what]
        assert numbers["count"] == 9
        alone = numbers["per_second"] / numbers["encoders_alone_per_second"]
        assert numbers["share"] == pytest.approx(alone, rel=0.01)


def test_a_start_is_timed_to_its_first_step(tmp_path):
    file = tmp_path / "start.jsonl"
    given = [*TINY, "--folder", str(tmp_path / "start"), "--only", "^eager$", "--json", str(file)]
    assert bench_start.main(given) == 0
    (found,) = results(file)
    assert found["seconds"] >= found["seconds_own"] > 0
    assert sum(found["timeline"].values()) == pytest.approx(found["seconds_own"], abs=0.5)
    assert "imports" in found["timeline"]
    assert not list(tmp_path.glob("start/output/*.safetensors")), "it is ended at its first step"


def test_gradients_of_8_bits_are_near_those_of_16(tmp_path):
    file = tmp_path / "numerics.jsonl"
    given = [*TINY, "--resolution", "64x64", "--samples", "1", "--json", str(file)]
    assert bench_numerics.main(given) == 0
    (found,) = results(file)
    assert found["control"]["up_random"]["least_cosine_of_a_tensor"] > 0.999
    for kind in ("fp8", "int8"):
        for case in ("up_zero", "up_random"):
            assert 0.995 < found[kind][case]["least_cosine_of_a_group"] < 1
            assert 0 < found[kind][case]["forward_relative_error"][0] < 0.01
    assert "double img_mlp_2 up" in found["fp8"]["up_zero"]["groups"]
    assert "double img_mlp_2 down" not in found["fp8"]["up_zero"]["groups"], "no gradient while up is zero"


def test_loss_curves(tmp_path):
    file = tmp_path / "numerics.jsonl"
    given = [
        *TINY,
        "--resolution",
        "64x64",
        "--samples",
        "2",
        "--curve",
        "8",
        "--kinds",
        "bf16",
        "fp8",
        "--json",
        str(file),
    ]
    assert bench_numerics.main([*given, "--learning_rate", "1e-3"]) == 0
    (found,) = results(file)
    assert found["losses"]["bf16"] != found["losses"]["fp8"]
    assert found["fp8"]["largest_relative_difference"] < 0.01


def test_mixed_resolutions_are_held_against_each_alone(tmp_path):
    file = tmp_path / "speed.jsonl"
    common = [*TINY, "--mixed_precision", "no", "--warmup", "1", "--json", str(file)]
    assert bench_train.main([*common, "--resolutions", "64x64", "--steps", "2", "--split", "2"]) == 0
    mixed = ["--resolutions", "64x64,64x128", "--steps", "8", "--against", str(file)]
    assert bench_train.main([*common, *mixed]) == 0
    alone, both = results(file)
    parts = alone["split"]
    assert {"data", "inputs", "forward", "backward", "optimizer"} <= set(parts)
    assert parts["forward"] > 0
    assert set(both["seconds_by_shape"]) == {"64x64", "64x128"}
    # 16 + 16 and 16 + 32 tokens: a step is expected to cost as much more as it has tokens.
    assert alone["seconds_per_step"] < both["seconds_single_bucket"] < 1.5 * alone["seconds_per_step"]
    assert both["mixed_to_single"] > 0
