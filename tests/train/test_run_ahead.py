"""Steps given to the device before the last one's numbers are read: same run, same reports, same safety."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice

import pytest
import torch

from library.errors import TrainingDiverged
from library.train.metrics import MetricsListener
from library.train.setup import batches, connected
from library.train.spent import Spent
from library.train.trainer import Trainer
from tools.bench_data import SIZES
from tools.bench_train import assemble, parse

STEPS = 6


@contextmanager
def trainer(*words: str) -> Iterator[tuple[Trainer, Iterator]]:
    """A tiny run whose optimizer can leave out steps, unless `words` say otherwise."""
    own, config = parse(
        ["--size", "tiny", "--resolutions", "64x64", "--seed", "1", "--attention", "math", *words]
    )
    with connected(config) as backend:
        job, _, made = assemble(config, backend, SIZES[own.size], own.resolutions)
        made.limits = type(made.limits)(
            total_steps=STEPS, micro_steps=1, max_grad_norm=1.0, scale_weight_norms=None
        )
        yield made, batches(job)


def weights(of: Trainer) -> list[torch.Tensor]:
    return [parameter.detach().clone() for parameter in of.parameters]


class Log:
    """A listener that sees every step and, at some, the weights."""

    def __init__(self, trainer: Trainer, at: tuple[int, ...]) -> None:
        self.trainer, self.at = trainer, at
        self.losses: list[float] = []
        self.steps: list[int] = []
        self.ahead: list[bool] = []
        self.seen: dict[int, list[torch.Tensor]] = {}

    def wants_weights(self, step: int) -> bool:
        return step in self.at

    def on_start(self, state):
        self.first = weights(self.trainer)
        return state

    def on_step(self, state, report):
        self.losses.append(report.loss)
        self.steps.append(state.step)
        steps_made = int(next(iter(self.trainer.optimizer.optimizer.state.values()))["step"])
        self.ahead.append(steps_made > state.step)
        if state.step in self.at:
            self.seen[state.step] = weights(self.trainer)
        return state

    def on_epoch(self, state, epoch):
        return state

    def on_end(self, state):
        return state


def logged(*words: str, at: tuple[int, ...] = (), ahead: bool = True, stop_at: int | None = None):
    with trainer(*words) as (made, stream):
        log = Log(made, at)
        made.listeners = (log,)
        if stop_at is not None:
            made.should_stop = lambda: made.state.step >= stop_at
        if not ahead:
            made.optimizer.optimizer._step_supports_amp_scaling = False
        finished = made.run(stream)
        return log, weights(made), finished


def test_reports_and_weights_are_those_of_steps_read_at_once():
    ahead, after, finished = logged(at=(3,))
    at_once, after_at_once, _ = logged(at=(3,), ahead=False)
    assert finished
    assert ahead.ahead == [True, True, False, True, True, False]  # told at once of 3, and of the last
    assert not any(at_once.ahead)
    assert ahead.steps == at_once.steps == [1, 2, 3, 4, 5, 6]
    assert ahead.losses == at_once.losses
    for one, other in ((ahead.seen[3], at_once.seen[3]), (after, after_at_once)):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(after, ahead.first, strict=True))


GGPO = ("--network_args", "ggpo_sigma=0.03", "ggpo_beta=0.01")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("graphs", ["off", "on"])
def test_the_host_waits_for_nothing_while_it_gives_a_step_to_the_gpu(graphs):
    """A GPU that is kept busy is busy still when the whole of a step is queued behind that."""
    with trainer("--cuda_graphs", graphs, "--optimizer_args", "fused=True") as (made, stream):
        for _ in range(4):  # kernels are compiled, memory is found, the third one is recorded
            made.optimizer_step(stream)
        torch.cuda.synchronize()
        torch.cuda._sleep(2 * 10**9)  # cycles: a second
        busy = torch.cuda.Event()
        busy.record()
        launched = made.launch(stream)
        assert not busy.query()
        report, _ = made.settle(launched)
        assert math.isfinite(report.loss)


def test_norms_of_a_network_come_with_the_report_and_hold_nobody_up():
    def run(*, ahead: bool) -> tuple[Log, list[dict[str, float]]]:
        with trainer(*GGPO) as (made, stream):
            log, norms = Log(made, ()), []
            real = log.on_step
            log.on_step = lambda state, report: norms.append(dict(report.norms)) or real(state, report)
            # Only one rank has it: were it to want weights, the others would launch a step without it.
            made.listeners = (log, MetricsListener([], Spent()))
            if not ahead:
                made.optimizer.optimizer._step_supports_amp_scaling = False
            made.run(stream)
            return log, norms

    log, norms = run(ahead=True)
    assert log.ahead == [True] * (STEPS - 1) + [False]
    assert norms == run(ahead=False)[1]
    assert all(report.keys() == norms[0].keys() for report in norms)
    assert len({report["norm/avg_key_norm"] for report in norms}) == STEPS


def test_a_listener_that_says_nothing_is_told_at_once():
    class Quiet(Log):
        wants_weights = None

    with trainer() as (made, stream):
        log = Quiet(made, ())
        made.listeners = (log,)
        made.run(stream)
    assert not any(log.ahead)


@pytest.mark.parametrize(
    "words",
    [
        ("--optimizer_args", "fused=False"),
        ("--mixed_precision", "fp16"),
        ("--lr_scheduler", "reduce_lr_on_plateau"),
        ("--optimizer_type", "Prodigy", "--optimizer_args", "safeguard_warmup=True"),
    ],
    ids=lambda words: words[1],
)
def test_what_needs_a_steps_numbers_waits_for_them(words):
    with trainer(*words) as (made, stream):
        assert not made.runs_ahead
        made.optimizer_step(stream)


def test_a_step_that_is_not_finite_is_not_made_nor_any_after_it():
    with trainer() as (made, stream):
        assert made.runs_ahead
        reports = made.steps(stream)
        for _ in range(2):
            next(reports)  # the third step is made by now
        before = weights(made)
        real = made.objective.loss
        object.__setattr__(made, "objective", Broken(made.objective, real))
        with pytest.raises(TrainingDiverged, match="step 4: the loss is nan"):
            list(islice(reports, 3))
        assert all(torch.equal(a, b) for a, b in zip(weights(made), before, strict=True))
        assert made.state.step == 3
        assert all(math.isfinite(loss) for loss in made.state.losses)


class Broken:
    """An objective whose first loss from now on is not a number, and whose others are."""

    def __init__(self, objective, real) -> None:
        self._objective, self._real, self._broken = objective, real, False

    def draw(self, *arguments, **options):
        return self._objective.draw(*arguments, **options)

    def loss(self, *arguments):
        loss = self._real(*arguments)
        if not self._broken:
            self._broken = True
            return loss * float("nan")
        return loss


@pytest.mark.parametrize(("method", "landed"), [("on_gradients", 2), ("norms", None)])
def test_an_error_leaves_the_state_that_the_weights_are_of_or_none(
    method: str, landed: int | None, monkeypatch: pytest.MonkeyPatch
):
    """The network's hooks before an update and behind it."""

    def fail(*_):
        raise MemoryError

    with trainer() as (made, stream):
        reports = made.steps(stream)
        next(reports)  # the second step is made by now
        monkeypatch.setattr(type(made.network), method, fail)
        with pytest.raises(MemoryError):
            next(reports)
        steps_made = int(next(iter(made.optimizer.optimizer.state.values()))["step"])
        state = made.landed()
        assert (state.step if state is not None else None) == landed
        assert steps_made == (landed or 3)


def test_a_wish_to_stop_ends_after_the_steps_in_hand():
    log, _, finished = logged(stop_at=2)
    assert not finished
    assert log.steps == list(range(1, log.steps[-1] + 1))
    assert log.steps[-1] < STEPS


def test_a_run_that_has_enough_ends_before_another_step_is_given():
    with trainer() as (made, stream):
        log = Log(made, (3,))  # where it is decided, the weights are wanted: by validation
        made.listeners = (log,)
        made.has_enough = lambda state: state.step >= 3
        assert made.run(stream)
        assert log.steps == [1, 2, 3]
        assert int(next(iter(made.optimizer.optimizer.state.values()))["step"]) == 3


def test_seconds_add_up_to_the_time_that_passed():
    with trainer() as (made, stream):
        log = Log(made, ())
        seconds = []
        real = log.on_step
        log.on_step = lambda state, report: seconds.append(report.seconds) or real(state, report)
        made.listeners = (log,)
        start = time.perf_counter()
        made.run(stream)
        assert sum(seconds) <= time.perf_counter() - start
        assert all(s > 0 for s in seconds)
