"""Ctrl-C as a terminal and a launcher send it: once, twice in a moment, and twice by a person."""

from __future__ import annotations

import signal

import pytest

from library.train import signals


def test_a_second_ctrl_c_stops_at_once_unless_it_is_the_launchers_echo(monkeypatch: pytest.MonkeyPatch):
    handlers = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    stop = signals.StopRequest()
    try:
        stop.install()
        assert not stop()
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)  # torchrun and accelerate pass on what the terminal sent
        signal.raise_signal(signal.SIGTERM)
        assert stop()
        signal.raise_signal(signal.SIGINT)
        monkeypatch.setattr(signals, "SAME_KEYPRESS", 0.0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_a_signal_is_spoken_of_only_when_asked_for(our_warnings):
    """It may come in the middle of writing the log."""
    handlers = {number: signal.getsignal(number) for number in signals.STOP_SIGNALS}
    stop = signals.StopRequest()
    try:
        stop.install()
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert not our_warnings
        assert stop()
        assert stop()
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert our_warnings == ["SIGTERM: finishing this step, then saving the state"]
