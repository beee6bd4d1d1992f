"""Names of what a run writes, and which moments have a network file."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

import pytest

from library.config.prompts import SamplePrompt
from library.config.sections.saving import SavingConfig
from library.train.naming import card_path, picture_name, saved_at, workflow_path


@pytest.mark.parametrize(
    ("output_name", "epoch", "seed", "expected"),
    [
        ("cat", 3, 42, "cat_e000003_01_20240102030405_42.png"),
        ("cat", None, None, "cat_000120_01_20240102030405.png"),
        (None, None, 0, "000120_01_20240102030405_0.png"),
    ],
)
def test_names_of_pictures_are_kohyas(
    output_name: str | None, epoch: int | None, seed: int | None, expected: str
):
    prompt = SamplePrompt(index=1, prompt="a", seed=seed)
    when = datetime(2024, 1, 2, 3, 4, 5)
    assert picture_name(prompt, output_name=output_name, epoch=epoch, step=120, when=when) == expected


def test_what_lies_beside_a_network_file_has_its_name():
    assert workflow_path(Path("o/cat-v1.5-000002.safetensors")) == Path("o/cat-v1.5-000002.workflow.json")
    assert card_path(SavingConfig(output_dir=Path("o"), output_name="cat-v1.5")) == Path("o/cat-v1.5.md")
    assert card_path(SavingConfig(output_dir=Path("o"))) == Path("o/last.md")


@pytest.mark.parametrize(
    ("step", "stem"),
    [
        (0, None),
        (5, "n-step00000005"),
        (8, "n-000002"),
        (4, None),
        (7, None),
        (10, "n-step00000010"),
        (12, "n"),
    ],
)
def test_the_file_of_a_moment(step: int, stem: str | None):
    saving = SavingConfig(output_dir=Path("o"), output_name="n", save_every_n_steps=5, save_every_n_epochs=2)
    # Three epochs of four steps; the last one's file is the final one.
    assert saved_at(saving, step=step, steps_per_epoch=4, num_epochs=3, total_steps=12) == stem
