"""The line at the first step. That a run prints it is tested where starts are measured."""

from __future__ import annotations

from library.startup import StartClock


def test_phases_add_up_and_short_ones_are_left_out():
    times = iter([10.0, 12.0, 12.04, 15.04, 16.54])
    clock = StartClock(lambda: next(times))
    for phase in ("imports", "config", "weights", "imports"):
        clock.mark(phase)
    assert clock.line() == "started in 6.5 s: imports 3.5, weights 3.0"


def test_nothing_that_took_any_time():
    clock = StartClock(lambda: 1.0)
    clock.mark("config")
    assert clock.line() == "started in 0.0 s"
