"""Schedules against the reference's recorded rates and against transformers and diffusers."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from diffusers.optimization import get_piecewise_constant_schedule
from small_network import groups, network, train

from library.config.sections.optimizer import OptimizerConfig
from library.config.sections.schedule import LR_SCHEDULERS, ScheduleConfig
from library.errors import ConfigError
from library.optim.factory import BuiltOptimizer
from library.optim.factory import build as build_optimizer
from library.optim.schedules import NAMED, PLATEAU, Schedule, build, resolve_steps

RECORDED = json.loads((Path(__file__).parents[1] / "data/optim/lr_schedules.json").read_text())


def _optimizer(name: str = "AdamW", lr: float = 1.0) -> BuiltOptimizer:
    return build_optimizer(OptimizerConfig(optimizer_type=name, learning_rate=lr), groups(network()))


def _config(name: str, *arguments: str, **more: object) -> ScheduleConfig:
    return ScheduleConfig(lr_scheduler=name, lr_scheduler_args=arguments, **more)


def _rates(schedule: Schedule, steps: int) -> list[float]:
    """Learning rate used at each optimizer step."""
    rates = []
    for _ in range(steps):
        rates.append(schedule.optimizer.param_groups[0]["lr"])
        schedule.optimizer.step()
        schedule.step()
    return rates


def _option(name: str, value: str) -> tuple[str, float]:
    return name.removeprefix("--"), float(value) if "." in value else int(value)


@pytest.mark.parametrize("case", RECORDED, ids=lambda case: f"{case['lr_scheduler']}-{case['num_processes']}")
def test_equals_the_reference(case):
    """The recorded warm-ups are shares, for which the reference's rates do not depend on the processes."""
    options = dict(_option(*pair) for pair in zip(case["args"][::2], case["args"][1::2], strict=True))
    schedule = build(
        _config(case["lr_scheduler"], **options),
        _optimizer(),
        base_lr=1.0,
        total_steps=case["max_train_steps"],
    )
    rates = _rates(schedule, case["max_train_steps"])
    assert rates == pytest.approx(case["lr_used_at_optimizer_steps"], abs=2e-6)


def _transformers(name: str, lr: float, warmup: int, total: int, extra: dict) -> list[float]:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=lr)
    scheduler = transformers.get_scheduler(name, optimizer, warmup, total, scheduler_specific_kwargs=extra)
    rates = []
    for _ in range(total + 3):
        rates.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("name", "arguments", "extra"),
    [
        ("constant_with_warmup", (), {}),
        ("linear", (), {}),
        ("cosine", ("num_cycles=1.5",), {"num_cycles": 1.5}),
        ("cosine_with_restarts", ("num_cycles=3",), {"num_cycles": 3}),
        ("polynomial", ("power=2", "lr_end=1e-5"), {"power": 2, "lr_end": 1e-5}),
        ("inverse_sqrt", ("timescale=9",), {"timescale": 9}),
        ("cosine_with_min_lr", ("min_lr=1e-4",), {"min_lr": 1e-4}),
        ("cosine_warmup_with_min_lr", ("min_lr_rate=0.2",), {"min_lr_rate": 0.2}),
        (
            "cosine_warmup_with_min_lr",
            ("min_lr_rate=0.2", "warmup_lr_rate=0.05"),
            {"min_lr_rate": 0.2, "warmup_lr_rate": 0.05},
        ),
        (
            "warmup_stable_decay",
            ("warmup_type='cosine'", "decay_type='1-sqrt'"),
            {"warmup_type": "cosine", "decay_type": "1-sqrt", "num_decay_steps": 8, "num_cycles": 0.5},
        ),
        (
            "warmup_stable_decay",
            ("warmup_type=1-sqrt", "decay_type=linear", "min_lr_ratio=0.1"),
            {"warmup_type": "1-sqrt", "decay_type": "linear", "num_decay_steps": 8, "min_lr_ratio": 0.1},
        ),
    ],
)
def test_equals_transformers_with_warm_up_and_arguments(name, arguments, extra):
    lr, warmup, total = 3e-4, 5, 30
    config = _config(name, *arguments, lr_warmup_steps=warmup, lr_decay_steps=8)
    schedule = build(config, _optimizer(lr=lr), base_lr=lr, total_steps=total)
    assert _rates(schedule, total + 3) == pytest.approx(
        _transformers(name, lr, warmup, total, extra), abs=1e-12
    )


def test_piecewise_constant_equals_diffusers():
    rules = "1:3,0.1:7,0.01"
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=0.5)
    reference = Schedule(get_piecewise_constant_schedule(optimizer, rules), optimizer, "", ())
    schedule = build(
        _config("piecewise_constant", f"step_rules={rules}"), _optimizer(lr=0.5), base_lr=0.5, total_steps=9
    )
    assert _rates(schedule, 10) == _rates(reference, 10)


@pytest.mark.parametrize(
    ("value", "steps"),
    [
        (0, 0),
        (7, 7),
        (1, 1),
        (0.1, 20),
        (1.0, 200),
        (100.0, 100),
        ("10%", 20),
        ("0.1", 20),
        ("30", 30),
        ("1", 1),
    ],
)
def test_steps_are_numbers_shares_or_percent(value, steps):
    assert resolve_steps(value, 200, option="lr_warmup_steps") == steps


@pytest.mark.parametrize("value", [-1, 1.5, "x", "5 %%"])
def test_other_steps_are_refused(value):
    with pytest.raises(ConfigError, match="lr_warmup_steps"):
        resolve_steps(value, 200, option="lr_warmup_steps")


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (_config("constant", lr_warmup_steps=10), "use constant_with_warmup"),
        (_config("REX"), "REX is not known; known are .*cosine"),
        (_config("cosin"), "did you mean cosine"),
        (_config("cosine_with_min_lr"), "needs lr_scheduler_min_lr_ratio"),
        (_config("piecewise_constant"), "needs lr_scheduler_args step_rules"),
        (_config("piecewise_constant", "step_rules='a:b'"), "step_rules"),
        (_config("cosine", "T_0=200"), "cosine has no argument T_0; it takes num_cycles"),
        (_config("cosine", "warmup_steps=100"), "the warm-up is lr_warmup_steps"),
        (_config("warmup_stable_decay", "decay_type=steep"), "decay_type=steep is not one of linear, cosine"),
        (_config("adafactor:1e-3"), "set automatically"),
        (_config("cosine", lr_scheduler_type="StepLr"), "did you mean StepLR"),
        (_config("cosine", "step_sizes=3", lr_scheduler_type="StepLR"), "it takes step_size, gamma"),
        (_config("cosine", "step_size=3", lr_scheduler_type="StepLR", lr_warmup_steps=5), "has no warm-up"),
        (_config("cosine", lr_scheduler_type="StepLR"), "StepLR refuses lr_scheduler_args.*step_size"),
    ],
)
def test_what_cannot_work_is_refused_in_a_sentence(config, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build(config, _optimizer(), base_lr=1.0, total_steps=100)


@pytest.mark.parametrize("kind", ["StepLR", "torch.optim.lr_scheduler.StepLR"])
def test_a_class_of_torch_or_a_path(kind):
    config = _config("cosine", "step_size=2", "gamma=0.5", lr_scheduler_type=kind)
    assert _rates(build(config, _optimizer(), base_lr=1.0, total_steps=6), 6) == [1, 1, 0.5, 0.5, 0.25, 0.25]


def test_reduce_on_plateau_follows_the_loss():
    schedule = build(
        _config(PLATEAU, "patience=1", "factor=0.5", "threshold=0.0"),
        _optimizer(),
        base_lr=1.0,
        total_steps=9,
    )
    assert schedule.needs_loss
    rates = []
    for loss in (3.0, 2.0, 2.0, 2.0, 2.0):
        schedule.step(loss)
        rates.append(schedule.optimizer.param_groups[0]["lr"])
    assert rates == [1.0, 1.0, 1.0, 0.5, 0.5]


def test_optimizers_that_set_their_own_rate_get_no_schedule():
    free = _optimizer("AdamWScheduleFree", lr=1e-2)
    schedule = build(_config("cosine", lr_warmup_steps=5), free, base_lr=1e-2, total_steps=10)
    assert _rates(schedule, 3) == [1e-2] * 3
    assert "warmup_steps" in schedule.notices[0]
    relative = build(_config("cosine"), _optimizer("Adafactor"), base_lr=1e-2, total_steps=10)
    assert _rates(relative, 2) == [None, None]


@pytest.mark.parametrize(
    "config",
    [_config(name, "step_rules=1:3,0.1") if name == "piecewise_constant" else _config(name) for name in NAMED]
    + [
        _config("cosine", "milestones=[2,5,6]", lr_scheduler_type="MultiStepLR"),
        _config("cosine", "T_0=3", lr_scheduler_type="CosineAnnealingWarmRestarts"),
        _config("cosine", "max_lr=0.1", "total_steps=12", lr_scheduler_type="OneCycleLR"),
    ],
    ids=lambda config: config.lr_scheduler_type or config.lr_scheduler,
)
def test_a_resumed_schedule_goes_on_as_if_uninterrupted(config):
    if "min_lr" in config.lr_scheduler:
        config = ScheduleConfig(lr_scheduler=config.lr_scheduler, lr_scheduler_min_lr_ratio=0.1)
    through = _rates(build(config, _optimizer(), base_lr=1.0, total_steps=12), 10)
    first = build(config, _optimizer(), base_lr=1.0, total_steps=12)
    assert _rates(first, 4) == through[:4]
    state = json.loads(json.dumps(first.state_dict()))
    second = build(config, _optimizer(), base_lr=1.0, total_steps=12)
    second.load_state_dict(state)
    assert _rates(second, 6) == through[4:]


@pytest.mark.parametrize("name", ["cosine", "linear", "constant_with_warmup"])
def test_a_schedule_follows_a_run_whose_steps_were_counted_anew(name: str):
    config = ScheduleConfig(lr_scheduler=name, lr_warmup_steps=0.2)
    through = _rates(build(config, _optimizer(), base_lr=1.0, total_steps=20), 20)
    first = build(config, _optimizer(), base_lr=1.0, total_steps=40)
    _rates(first, 16)
    second = build(config, _optimizer(), base_lr=1.0, total_steps=20)  # twice the batch: half the steps
    second.load_state_dict(first.state_dict(), moved=8 - 16)
    assert _rates(second, 12) == pytest.approx(through[8:])


def test_a_resumed_plateau_remembers_its_best():
    config = _config(PLATEAU, "patience=0", "factor=0.5")
    first = build(config, _optimizer(), base_lr=1.0, total_steps=9)
    first.step(1.0)
    first.step(2.0)
    second = build(config, _optimizer(), base_lr=1.0, total_steps=9)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    second.step(1.5)
    assert second.optimizer.param_groups[0]["lr"] == 0.25


def test_groups_keep_their_ratio():
    module = network()
    optimizer = build_optimizer(OptimizerConfig(learning_rate=1e-3), groups(module))
    optimizer.optimizer.param_groups[1]["lr"] = 1e-4
    schedule = build(_config("linear"), optimizer, base_lr=1e-3, total_steps=10)
    train(module, optimizer.optimizer, range(1))
    schedule.step()
    assert optimizer.learning_rates() == pytest.approx({"first": 9e-4, "last": 9e-5})


def test_the_names_checked_while_options_are_read_are_those_that_exist():
    assert {*NAMED, PLATEAU} == set(LR_SCHEDULERS)


@pytest.mark.parametrize(
    ("name", "argument", "base_lr", "sentence"),
    [
        ("polynomial", "power=2", 0.0, "raise learning_rate above it"),
        ("polynomial", "lr_end=1e-3", 1e-4, "falls from learning_rate, 0.0001, to lr_end, 0.001"),
        ("cosine_with_min_lr", "min_lr=1", 1.0, "to min_lr, 1"),
        ("polynomial", "lr_end=big", 1.0, "lr_end=big is not a number"),
        ("cosine", "num_cycles=many", 1.0, "num_cycles=many is not a number"),
    ],
)
def test_arguments_that_make_no_sense_are_refused_in_a_sentence(name, argument, base_lr, sentence):
    with pytest.raises(ConfigError, match=sentence):
        build(_config(name, argument), _optimizer(), base_lr=base_lr, total_steps=10)


def test_a_warm_up_longer_than_the_run_is_noticed():
    def notices(warmup: int) -> tuple[str, ...]:
        config = _config("cosine", lr_warmup_steps=warmup)
        return build(config, _optimizer(), base_lr=1.0, total_steps=10).notices

    assert notices(10) == ()
    (notice,) = notices(11)
    assert notice.startswith("lr_warmup_steps (11) and lr_decay_steps (0) are more than the 10 steps")


def test_a_missing_class_is_answered_with_schedulers_only():
    config = ScheduleConfig(lr_scheduler_type="Nope")
    with pytest.raises(ConfigError, match="known are ChainedScheduler") as error:
        build(config, _optimizer(), base_lr=1.0, total_steps=10)
    assert "Counter" not in str(error.value)
