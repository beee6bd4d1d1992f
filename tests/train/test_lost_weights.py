"""Weights that an update left not finite: they take the place of no others, and no run goes on from them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from library.errors import TrainingDiverged
from library.train.checkpoint import newest_run
from library.train.naming import step_save
from library.train.resume import capture
from library.train.saving import About, Saver, Weights
from tests.train.test_killed_saves import Run, state_at


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, our_warnings: list[str], number: float):
    run = Run(tmp_path)
    saver = Saver(
        config=run.config, capture=lambda now: capture(now, run.parts), backend=run.backend,
        weights=Weights(run.network, run.optimizer.evaluating, None, judged_by_ema=False),
        about=About(lambda state, epoch: {}),
    )  # fmt: skip
    for step in (1, 2):
        saver.at(step_save(run.config, step=step), state_at(step), epoch=1)
    before = sorted(tmp_path.iterdir())
    with torch.no_grad():
        run.network.trainable_parameters()[-1].view(-1)[-1] = number
    point = step_save(run.config, step=3)
    assert point.retires_model  # so a save would cost an older file
    for save in (
        lambda: saver.at(point, state_at(3), epoch=1),
        lambda: saver.final(state_at(3), epoch=1),
        lambda: saver.interrupted(state_at(3)),
    ):
        with pytest.raises(TrainingDiverged, match="step 3: it left weights that are not finite"):
            save()
    assert not our_warnings
    assert saver.diverged(state_at(3)) is None
    saver.rescue(state_at(3))
    assert our_warnings == ["no state is left of step 3, as its weights are not finite"]
    assert sorted(tmp_path.iterdir()) == before
    assert newest_run(tmp_path, "out") == tmp_path / "out-step00000002-state"
