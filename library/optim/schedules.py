"""Learning-rate schedules by Kohya's names, stepped once per optimizer step.

The reference steps its schedule once per process and step, so that whole numbers of warm-up steps shrink with
the number of GPUs; here a step is an optimizer step everywhere. Names that it accepts and then fails on
(reduce_lr_on_plateau, cosine_warmup_with_min_lr) work.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import cast

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau

from library.config.sections.schedule import ScheduleConfig
from library.errors import ConfigError
from library.optim import multipliers
from library.optim.factory import BuiltOptimizer
from library.optim.plugins import check_arguments, import_class, nearest, parse_arguments
from library.optim.state import from_plain, to_plain

Values = dict[str, object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """What a named schedule is computed from."""

    config: ScheduleConfig
    base_lr: float
    total: int  # optimizer steps of the run
    warmup: int  # optimizer steps
    decay: int  # optimizer steps


@dataclass(frozen=True, slots=True)
class Named:
    """A schedule: its multiplier, the arguments that the options give it, and the further ones it may be
    given.
    """

    multiplier: Callable[..., float]
    arguments: Callable[[Run], Values]
    extra: tuple[str, ...] = ()


def _warmup(run: Run) -> Values:
    return {"warmup": run.warmup}


def _warmup_total(run: Run) -> Values:
    return {"warmup": run.warmup, "total": run.total}


def _restarts(run: Run) -> Values:
    return {**_warmup_total(run), "num_cycles": run.config.lr_scheduler_num_cycles}


def _polynomial(run: Run) -> Values:
    # 1e-7 is transformers' rate at the end
    return {**_warmup_total(run), "power": run.config.lr_scheduler_power, "lr_end": 1e-7}


def _inverse_sqrt(run: Run) -> Values:
    return {"warmup": run.warmup, "timescale": run.config.lr_scheduler_timescale}


def _with_min_lr(run: Run) -> Values:
    values = {**_warmup_total(run), "num_cycles": run.config.lr_scheduler_num_cycles / 2}
    ratio = run.config.lr_scheduler_min_lr_ratio
    return values if ratio is None else {**values, "min_lr_rate": ratio}


def _stable_decay(run: Run) -> Values:
    return {
        "phases": (run.warmup, run.total - run.warmup - run.decay, run.decay),
        "num_cycles": run.config.lr_scheduler_num_cycles / 2,
        "min_lr_ratio": run.config.lr_scheduler_min_lr_ratio or 0.0,
    }


def _nothing(_run: Run) -> Values:
    return {}


NAMED: Mapping[str, Named] = {
    "constant": Named(multipliers.constant, _nothing),
    "constant_with_warmup": Named(multipliers.constant_with_warmup, _warmup),
    "linear": Named(multipliers.linear, _warmup_total),
    "cosine": Named(multipliers.cosine, _warmup_total, ("num_cycles",)),
    "cosine_with_restarts": Named(multipliers.cosine_with_restarts, _restarts, ("num_cycles",)),
    "polynomial": Named(multipliers.polynomial, _polynomial, ("power", "lr_end")),
    "inverse_sqrt": Named(multipliers.inverse_sqrt, _inverse_sqrt, ("timescale",)),
    "cosine_with_min_lr": Named(
        multipliers.cosine_with_min_lr, _with_min_lr, ("num_cycles", "min_lr", "min_lr_rate")
    ),
    "cosine_warmup_with_min_lr": Named(
        multipliers.cosine_warmup_with_min_lr,
        _with_min_lr,
        ("num_cycles", "min_lr", "min_lr_rate", "warmup_lr_rate"),
    ),
    "warmup_stable_decay": Named(
        multipliers.warmup_stable_decay,
        _stable_decay,
        ("num_cycles", "min_lr_ratio", "warmup_type", "decay_type"),
    ),
    "piecewise_constant": Named(multipliers.piecewise_constant, _nothing, ("step_rules",)),
}
PLATEAU = "reduce_lr_on_plateau"
# Further arguments that are numbers; min_lr_rate and timescale may be None, which is "not given".
NUMBERS = frozenset({"num_cycles", "power", "lr_end", "min_lr", "min_lr_ratio"})
WITHOUT_WARMUP = ("constant", "piecewise_constant", PLATEAU)


@dataclass(frozen=True, slots=True)
class Schedule:
    """Sets the learning rates of the optimizer's groups; call `step` once after each optimizer step."""

    scheduler: LRScheduler | ReduceLROnPlateau | None  # None: the optimizer sets its own rates
    optimizer: torch.optim.Optimizer
    description: str
    notices: tuple[str, ...]

    @property
    def needs_loss(self) -> bool:
        """True if `step` must be given the step's mean loss, the same number on every rank."""
        return isinstance(self.scheduler, ReduceLROnPlateau)

    def step(self, loss: float | None = None) -> None:
        """Set the learning rates of the next optimizer step."""
        if isinstance(self.scheduler, ReduceLROnPlateau):
            assert loss is not None, "a schedule that needs the loss was stepped without one"
            self.scheduler.step(loss)
        elif self.scheduler is not None:
            self.scheduler.step()

    def state_dict(self) -> object:
        """JSON values from which `load_state_dict` continues."""
        tensors: dict[str, Tensor] = {}
        plain = to_plain(
            self.scheduler.state_dict() if self.scheduler is not None else {}, tensors, "schedule"
        )
        assert not tensors, "learning rates are plain numbers here"
        return plain

    def load_state_dict(self, state: object, *, moved: int = 0) -> None:
        """Continue from `state`, the learning rates of the optimizer's groups included.

        `moved`: by how many steps the run's position changed since, where its steps were counted anew.
        """
        if self.scheduler is None:
            return
        self.scheduler.load_state_dict(cast(Values, from_plain(state, {})))
        if moved and isinstance(self.scheduler, LambdaLR):
            step = self.scheduler.last_epoch = self.scheduler.last_epoch + moved
            factors = zip(self.scheduler.base_lrs, self.scheduler.lr_lambdas, strict=True)
            self.scheduler._last_lr = [rate * factor(step) for rate, factor in factors]
        for group, rate in zip(self.optimizer.param_groups, self.scheduler.get_last_lr(), strict=True):
            group["lr"] = rate


def resolve_steps(value: float | str, total: int, *, option: str) -> int:
    """Optimizer steps from a whole number, a share of `total` up to 1, or a text of either or of percent."""
    number = _read_number(value, option) if isinstance(value, str) else value
    if number < 0:
        raise ConfigError(f"{option} = {value} is negative")
    if isinstance(number, float) and number <= 1:
        return int(number * total)
    if number != int(number):
        raise ConfigError(
            f"{option} = {value} is neither a whole number of steps nor a share between 0 and 1"
        )
    return int(number)


def _read_number(text: str, option: str) -> float:
    """An int for a whole number of steps, a float for a share."""
    text = text.strip()
    try:
        if text.endswith("%"):
            return float(text.removesuffix("%")) / 100
        return int(text) if text.lstrip("+-").isdigit() else float(text)
    except ValueError as error:
        raise ConfigError(f'{option} = "{text}" is not a number of steps, a share or a percentage') from error


def build(config: ScheduleConfig, optimizer: BuiltOptimizer, *, base_lr: float, total_steps: int) -> Schedule:
    """The schedule that the options name, for a run of `total_steps` optimizer steps.

    `base_lr` is learning_rate, which absolute rates (lr_end, min_lr) are compared with. Unknown names and
    arguments are a `ConfigError`.
    """
    run = _run(config, base_lr, total_steps)
    if optimizer.sets_own_rate:
        return _without(run, optimizer)
    resolved = _resolve(run)
    try:
        scheduler = resolved.make(optimizer.optimizer)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"lr_scheduler {resolved.name} refuses lr_scheduler_args: {error}") from error
    return Schedule(scheduler, optimizer.optimizer, resolved.name, resolved.notices)


def check(config: ScheduleConfig, *, base_lr: float, total_steps: int) -> tuple[str, ...]:
    """Raise what `build` would raise, before anything is loaded; returns its notices.

    For an optimizer whose rates a schedule may set: others take none.
    """
    return _resolve(_run(config, base_lr, total_steps)).notices


@dataclass(frozen=True, slots=True)
class _Resolved:
    """A schedule whose name and arguments are known to be right."""

    name: str
    make: Callable[[torch.optim.Optimizer], LRScheduler]
    notices: tuple[str, ...]


def _run(config: ScheduleConfig, base_lr: float, total_steps: int) -> Run:
    return Run(
        config=config,
        base_lr=base_lr,
        total=total_steps,
        warmup=resolve_steps(config.lr_warmup_steps, total_steps, option="lr_warmup_steps"),
        decay=resolve_steps(config.lr_decay_steps, total_steps, option="lr_decay_steps"),
    )


def _resolve(run: Run) -> _Resolved:
    config = run.config
    parsed = parse_arguments(config.lr_scheduler_args, option="lr_scheduler_args")
    name = config.lr_scheduler_type or config.lr_scheduler
    if config.lr_scheduler_type or name in WITHOUT_WARMUP:
        _refuse_warmup(run, name)
    make: Callable[[torch.optim.Optimizer], LRScheduler]
    if config.lr_scheduler_type or name == PLATEAU:
        make = partial(_foreign(name, parsed.values), **parsed.values)
    else:
        make = partial(LambdaLR, lr_lambda=_multiplier(name, run, parsed.values))
    return _Resolved(name, make, (*parsed.notices, *_too_long(run)))


def _too_long(run: Run) -> tuple[str, ...]:
    """A notice when warm-up and decay do not fit into the run, which both programs accept."""
    if run.warmup + run.decay <= run.total:
        return ()
    return (
        f"lr_warmup_steps ({run.warmup}) and lr_decay_steps ({run.decay}) are more than the {run.total} steps "
        "of the run, so the full learning rate is not reached or not kept",
    )


def _without(run: Run, optimizer: BuiltOptimizer) -> Schedule:
    """No schedule, and a notice if one was asked for in vain."""
    notices: tuple[str, ...] = ()
    if optimizer.is_schedule_free and (run.config.lr_scheduler != "constant" or run.warmup):
        notices = (
            "a schedule-free optimizer has no learning-rate schedule: lr_scheduler and lr_warmup_steps have "
            "no effect; its own warm-up is optimizer_args warmup_steps=...",
        )
    return Schedule(None, optimizer.optimizer, "none", notices)


def _refuse_warmup(run: Run, name: str) -> None:
    if run.warmup:
        better = "; use constant_with_warmup" if name == "constant" else ""
        raise ConfigError(
            f"lr_scheduler {name} has no warm-up, but lr_warmup_steps is {run.config.lr_warmup_steps}{better}"
        )


def _foreign(name: str, arguments: Mapping[str, object]) -> Callable[..., LRScheduler]:
    """A class of torch.optim.lr_scheduler, or module.Class, that takes these lr_scheduler_args."""
    module, dot, class_name = ("", "", "ReduceLROnPlateau") if name == PLATEAU else name.rpartition(".")
    kind = import_class(
        module if dot else "torch.optim.lr_scheduler", class_name, option=f"lr_scheduler_type = {name}"
    )
    check_arguments(
        arguments, target=kind, option="lr_scheduler_args", reserved={"optimizer": "the optimizer options"}
    )
    return cast("Callable[..., LRScheduler]", kind)


def _multiplier(name: str, run: Run, given: Mapping[str, object]) -> Callable[[int], float]:
    """The multiplier of a named schedule with its arguments settled."""
    if name.startswith("adafactor:"):
        raise ConfigError(
            f"lr_scheduler = {name} is set automatically for Adafactor with relative_step=True; leave it out"
        )
    if name not in NAMED:
        raise ConfigError(f"lr_scheduler = {name} is not known; {nearest(name, (*NAMED, PLATEAU))}")
    named = NAMED[name]
    for key in given:
        if key not in named.extra:
            raise ConfigError(
                f"lr_scheduler_args: {name} has no argument {key}; it takes "
                f"{', '.join(named.extra) or 'none'} "
                "(the warm-up is lr_warmup_steps)"
            )
    multiplier = partial(named.multiplier, **_settle(name, {**named.arguments(run), **given}, run))
    missing = [
        one.name
        for one in inspect.signature(multiplier).parameters.values()
        if one.kind is inspect.Parameter.KEYWORD_ONLY and one.default is inspect.Parameter.empty
    ]
    if missing:
        needed = {"min_lr_rate": "lr_scheduler_min_lr_ratio", "rules": "lr_scheduler_args step_rules"}[
            missing[0]
        ]
        raise ConfigError(f"lr_scheduler = {name} needs {needed}")
    return multiplier


def _settle(name: str, values: Values, run: Run) -> Values:
    """Turn absolute rates into factors, and texts into values."""
    for key in NUMBERS & values.keys():
        if not isinstance(values[key], (int, float)):
            raise ConfigError(f"lr_scheduler_args: {key}={values[key]} is not a number")
    if name == "warmup_stable_decay":
        multipliers.check_shapes(
            **{key: str(values[key]) for key in ("warmup_type", "decay_type") if key in values}
        )
    if "min_lr" in values:
        values["min_lr_rate"] = _share(name, "min_lr", cast(float, values.pop("min_lr")), run.base_lr)
    if "lr_end" in values:
        values["lr_end_rate"] = _share(name, "lr_end", cast(float, values.pop("lr_end")), run.base_lr)
    if "step_rules" in values:
        values["rules"], values["last"] = multipliers.read_step_rules(str(values.pop("step_rules")))
    return values


def _share(name: str, key: str, rate: float, base_lr: float) -> float:
    """An absolute rate as a factor on learning_rate, which must be the higher one."""
    if rate >= base_lr:
        raise ConfigError(
            f"lr_scheduler {name} falls from learning_rate, {base_lr:g}, to {key}, {rate:g}: "
            f"raise learning_rate above it, even where other rates are used, or lower {key} in lr_scheduler_args"
        )
    return rate / base_lr
