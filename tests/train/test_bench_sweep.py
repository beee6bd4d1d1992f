"""The sweep of measurements: real ones of a tiny model, one that fails, one that takes too long."""

from __future__ import annotations

import json

import pytest

from tools.bench_sweep import CASES, chosen_cases, main
from tools.bench_train import parse

TINY = "--size tiny --resolutions 64x64 --steps 2 --warmup 1"


def test_every_case_of_the_table_is_a_run():
    for words in chosen_cases(None, ()).values():
        own, config = parse(words)
        assert own.steps > 1
        assert config.network.network_dim == 16
    assert len(chosen_cases("^fp8", ())) < len(CASES)


def test_results_are_kept_one_by_one_and_not_measured_twice(tmp_path, capsys):
    file = tmp_path / "speed.jsonl"
    cases = ["--case", f"tiny: {TINY}", "--case", f"wrong: {TINY} --base_compute fp4", "--json", str(file)]
    assert main(cases) == 1
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [line["case"] for line in lines] == ["tiny", "wrong"]
    assert lines[0]["seconds_per_step"] > 0
    assert lines[0]["options"] == TINY.split()
    assert "base_compute" in lines[1]["failed"]
    assert main(["--case", f"tiny: {TINY}", "--json", str(file)]) == 0
    assert len(file.read_text().splitlines()) == 2
    assert main(["--case", f"slow: {TINY}", "--timeout", "0.5", "--json", str(file)]) == 1
    assert "no result within" in json.loads(file.read_text().splitlines()[-1])["failed"]
    assert "tiny: " in capsys.readouterr().out


@pytest.mark.parametrize("text", ["--steps 3", ": --steps 3"])
def test_a_case_without_a_name(text, tmp_path, capsys):
    assert main(["--case", text, "--json", str(tmp_path / "x")]) == 2
    assert "has no name" in capsys.readouterr().err
