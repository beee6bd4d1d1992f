"""A disk that refuses: training goes on, what was there before stays whole, the last line says it."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flux_train_network import main
from tests.e2e.running import draw_pictures, write_config


@contextmanager
def files_no_larger_than(size: int) -> Iterator[None]:
    """The system refuses to write beyond `size` bytes of a file meanwhile, as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    "options",
    [{}, {"save_model_as": "pt"}, {"network_module": "lycoris.kohya"}],
    ids=["own", "pt", "lycoris"],
)
def test_a_full_disk_takes_nothing_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, object]
):
    draw_pictures(tmp_path / "data" / "1_waves", [(64, 64)] * 2)
    config = write_config(
        tmp_path / "c.toml", tmp_path / "data", tmp_path / "out", max_train_epochs=None, max_train_steps=3,
        train_batch_size=1, save_every_n_steps=1, save_last_n_steps=1, save_state=True, cache_latents_to_disk=True,
        t5xxl_max_token_length=16, **options,
    )  # fmt: skip
    assert main(["--config_file", str(config), "--max_train_steps", "2", "--save_last_n_steps", "9"]) == 0
    kinds = (".safetensors", ".pt")
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.suffix in kinds}
    assert before
    capsys.readouterr()
    with files_no_larger_than(10_000):
        assert main(["--config_file", str(config), "--resume", "auto"]) == 5
    said = capsys.readouterr().err.replace("\n", " ")
    assert "Training goes on" in said
    assert "Traceback" not in said
    last = f"out.{options.get('save_model_as', 'safetensors')}"
    assert f"error: {tmp_path / 'out' / last} could not be written" in said
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.suffix in kinds} == before
    assert not list((tmp_path / "out").glob(".*")), "half a file was left"
