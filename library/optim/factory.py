"""Optimizers by name, each from its own package, as Kohya names them.

Names are found whatever their case, in the table and then in torch.optim; `module.Class` is exact.
Packages are imported when they are chosen, so a missing one stops only those who ask for it. Learning-rate
schedules are `schedules.py`; saving and restoring what an optimizer remembers is `state.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol, cast

import torch
from torch import Tensor

from library.config.sections.optimizer import OptimizerConfig
from library.errors import ConfigError
from library.optim.plugins import (
    Arguments,
    check_arguments,
    classes_of,
    closest,
    import_class,
    listed,
    parse_arguments,
)


class ParameterGroup(Protocol):
    """Parameters that share a learning rate. `lr` None means learning_rate."""

    @property
    def name(self) -> str: ...
    @property
    def params(self) -> Sequence[torch.nn.Parameter]: ...
    @property
    def lr(self) -> float | None: ...


@dataclass(frozen=True, slots=True)
class Recipe:
    """Where a named optimizer's class is and what Kohya gives it."""

    module: str
    name: str
    fixed: Mapping[str, object] = field(default_factory=dict)  # always given
    defaults: Mapping[str, object] = field(default_factory=dict)  # given unless optimizer_args say otherwise
    adapts_rate: bool = False  # finds its own step size d; learning rates multiply it and should be near 1
    needs_one_rate: bool = False  # its step refuses groups of different learning rates, 0 excepted


def _adaptive(module: str, name: str, *, one_rate: bool = True) -> Recipe:
    return Recipe(module, name, adapts_rate=True, needs_one_rate=one_rate)


_NESTEROV: Mapping[str, object] = {"nesterov": True}
_MOMENTUM: Mapping[str, object] = {"momentum": 0.9}

RECIPES: Mapping[str, Recipe] = {
    "AdamW": Recipe("torch.optim", "AdamW"),
    "AdamW8bit": Recipe("bitsandbytes.optim", "AdamW8bit"),
    "PagedAdamW": Recipe("bitsandbytes.optim", "PagedAdamW"),
    "PagedAdamW8bit": Recipe("bitsandbytes.optim", "PagedAdamW8bit"),
    "PagedAdamW32bit": Recipe("bitsandbytes.optim", "PagedAdamW32bit"),
    "Lion": Recipe("lion_pytorch", "Lion"),
    "Lion8bit": Recipe("bitsandbytes.optim", "Lion8bit"),
    "PagedLion8bit": Recipe("bitsandbytes.optim", "PagedLion8bit"),
    "SGDNesterov": Recipe("torch.optim", "SGD", _NESTEROV, _MOMENTUM),
    "SGDNesterov8bit": Recipe("bitsandbytes.optim", "SGD8bit", _NESTEROV, _MOMENTUM),
    "DAdaptation": _adaptive("dadaptation.experimental", "DAdaptAdamPreprint"),
    "DAdaptAdamPreprint": _adaptive("dadaptation.experimental", "DAdaptAdamPreprint"),
    "DAdaptAdaGrad": _adaptive("dadaptation", "DAdaptAdaGrad", one_rate=False),
    "DAdaptAdam": _adaptive("dadaptation", "DAdaptAdam"),
    "DAdaptAdan": _adaptive("dadaptation", "DAdaptAdan", one_rate=False),
    "DAdaptAdanIP": _adaptive("dadaptation.experimental", "DAdaptAdanIP", one_rate=False),
    "DAdaptLion": _adaptive("dadaptation", "DAdaptLion"),
    "DAdaptSGD": _adaptive("dadaptation", "DAdaptSGD"),
    "Prodigy": _adaptive("prodigyopt", "Prodigy"),
    "ProdigyPlusScheduleFree": _adaptive("prodigyplus", "ProdigyPlusScheduleFree", one_rate=False),
    "Adafactor": Recipe("transformers.optimization", "Adafactor", defaults={"relative_step": True}),
    "RAdamScheduleFree": Recipe("schedulefree", "RAdamScheduleFree"),
    "AdamWScheduleFree": Recipe("schedulefree", "AdamWScheduleFree"),
    "SGDScheduleFree": Recipe("schedulefree", "SGDScheduleFree"),
    "AdEMAMix8bit": Recipe("bitsandbytes.optim", "AdEMAMix8bit"),
    "CAME": Recipe("pytorch_optimizer", "CAME"),
}

# Classes of torch.optim that fail at the first step
UNUSABLE: Mapping[str, str] = {
    "lbfgs": "evaluates the loss several times a step, which training here does once",
    "sparseadam": "takes sparse gradients only, which no adapter has",
}
# Names of other trainers and of packages, seen in configs, whose meaning is plain
ALIASES: Mapping[str, str] = {"prodigyopt": "Prodigy", "adamw_torch": "AdamW", "adamw_torch_fused": "AdamW"}


@dataclass(frozen=True, slots=True)
class BuiltOptimizer:
    """An optimizer with what the trainer needs to know about it."""

    optimizer: torch.optim.Optimizer
    description: str  # "module.Class(key=value,...)", for the metadata of the saved file
    is_schedule_free: (
        bool  # it averages weights: `train` before steps, `eval` before weights are used or saved
    )
    sets_own_rate: bool  # no schedule may touch its learning rates
    notices: tuple[str, ...]

    def train(self) -> None:
        """Put the weights that steps are taken from in place."""
        self._switch("train")

    def eval(self) -> None:
        """Put the weights that are to be used, sampled with and saved in place."""
        self._switch("eval")

    @contextmanager
    def evaluating(self) -> Iterator[None]:
        """Have the weights that are to be used in place for a while, then those to train on, to the bit.

        Switching there and back rounds; what one rank alone does in between must not part it from the others.
        """
        if not self.is_schedule_free:
            yield
            return
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        kept = [parameter.detach().clone() for parameter in parameters]
        try:
            self.eval()
            yield
        finally:
            self.train()
            for parameter, value in zip(parameters, kept, strict=True):
                parameter.data.copy_(value)

    def _switch(self, mode: str) -> None:
        if self.is_schedule_free:
            cast("Callable[[], None]", getattr(self.optimizer, mode))()

    @property
    def can_leave_out(self) -> bool:
        """Whether a number on the device can keep a step from being made: torch's fused optimizers."""
        return bool(getattr(self.optimizer, "_step_supports_amp_scaling", False))

    def leave_out(self, flag: Tensor) -> None:
        """Make the next steps only if `flag` [], float32 on the parameters' device, is 0 by then."""
        self.optimizer.found_inf = flag  # type: ignore[attr-defined]

    def learning_rates(self) -> dict[str, float]:
        """Learning rate of each group by its name; for Adafactor's relative steps the one last used, 0
        before.
        """
        return {group["name"]: self._rate(group) for group in self.optimizer.param_groups}

    def adapted_rates(self) -> dict[str, float]:
        """d * lr of each group for optimizers that estimate a step size d (Prodigy, D-Adaptation); else
        empty.
        """
        groups = (group for group in self.optimizer.param_groups if "d" in group)
        return {
            group["name"]: float(group["d"]) * float(group.get("effective_lr", group["lr"]))
            for group in groups
        }

    def _rate(self, group: dict[str, object]) -> float:
        if group["lr"] is not None:
            return float(cast(float, group["lr"]))
        states = (self.optimizer.state.get(one) for one in cast("list[Tensor]", group["params"]))
        started = next((state for state in states if state), None)
        if started is None:
            return 0.0
        rate = cast("Callable[[object, object], float]", getattr(self.optimizer, "_get_lr"))  # noqa: B009
        return float(rate(group, started))


def build(
    config: OptimizerConfig, groups: Sequence[ParameterGroup], *, may_fuse: bool = True
) -> BuiltOptimizer:
    """The optimizer that the options name, over `groups`.

    With `may_fuse` AdamW steps in one kernel on NVIDIA GPUs unless its arguments say otherwise.

    Raises `ConfigError` for unknown names and arguments and `EnvironmentUnsupported` for a missing package.
    """
    recipe, kind, parsed = _resolve(config)
    notices = parsed.notices
    arguments = {**recipe.defaults, **parsed.values}
    relative = False
    if recipe.name == "Adafactor":
        relative, notices = _settle_adafactor(arguments, config, notices)
    entries = _entries(groups, config.learning_rate, relative=relative)
    if recipe.adapts_rate:
        notices += _check_adaptive(recipe, [cast(float, entry["lr"]) for entry in entries])
    optimizer = _construct(
        kind, entries, None if relative else config.learning_rate,
        {**recipe.fixed, **(_fused(recipe, arguments, groups) if may_fuse else {}), **arguments},
    )  # fmt: skip
    switches = callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))
    is_schedule_free = switches and recipe.name.lower().endswith("schedulefree")
    built = BuiltOptimizer(
        optimizer=optimizer,
        description=_describe(kind, arguments),
        is_schedule_free=is_schedule_free,
        sets_own_rate=relative or is_schedule_free,
        notices=notices,
    )
    built.train()
    return built


def check(config: OptimizerConfig) -> tuple[str, ...]:
    """Raise what `build` would raise for a wrong name, package or argument, before anything is loaded.

    Returns how the name and the arguments are read where that is not plain, for a dry run to say.
    """
    return _resolve(config)[2].notices


def sets_own_rate(config: OptimizerConfig) -> bool:
    """Whether `build` would give an optimizer that takes no schedule."""
    recipe, _, parsed = _resolve(config)
    if recipe.name == "Adafactor":
        return _settle_adafactor({**recipe.defaults, **parsed.values}, config, ())[0]
    return recipe.name.lower().endswith("schedulefree")


def _resolve(config: OptimizerConfig) -> tuple[Recipe, type, Arguments]:
    """The named optimizer's class and its checked arguments."""
    recipe, notices = _choose(config)
    parsed = parse_arguments(config.optimizer_args, option="optimizer_args")
    kind = import_class(recipe.module, recipe.name, option=f"optimizer_type = {recipe.name}")
    check_arguments(
        parsed.values,
        target=kind,
        option="optimizer_args",
        reserved={"params": "the network", "lr": "learning_rate"},
        own=tuple(recipe.fixed),
    )
    return recipe, kind, Arguments(parsed.values, (*notices, *parsed.notices))


def _choose(config: OptimizerConfig) -> tuple[Recipe, tuple[str, ...]]:
    """Where the class of the named optimizer is. (use_8bit_adam and use_lion_optimizer came in as names.)"""
    name = config.optimizer_type or "AdamW"
    by_lower = {one.lower(): recipe for one, recipe in RECIPES.items()}
    alias = ALIASES.get(name.lower())
    if alias is not None:
        return RECIPES[alias], (f"optimizer_type = {name} is read as {alias}",)
    if name.lower() in by_lower:
        return by_lower[name.lower()], ()
    module, dot, class_name = name.rpartition(".")
    if dot:
        return Recipe(module, class_name), ()
    if name.lower() in UNUSABLE:
        raise ConfigError(f"optimizer_type = {name} {UNUSABLE[name.lower()]}; AdamW is the usual choice")
    in_torch = {
        one.lower(): one for one in classes_of("torch.optim") if one.lower() not in {"optimizer", *UNUSABLE}
    }
    if name.lower() not in in_torch:
        known = {*RECIPES, *in_torch.values()}
        near = closest(name, sorted(known), cutoff=0)[0]
        raise ConfigError(
            f"optimizer_type = {name} is not known; did you mean {near}? ({listed(known)}; "
            "any other class can be given as module.Class)"
        )
    return Recipe("torch.optim", in_torch[name.lower()]), ()


def _fused(
    recipe: Recipe, arguments: Mapping[str, object], groups: Sequence[ParameterGroup]
) -> dict[str, object]:
    """What makes AdamW one kernel, if it can be: the same sums in another order of kernels."""
    chosen = {"fused", "foreach", "capturable", "differentiable"} & arguments.keys()
    on_gpu = all(parameter.is_cuda for group in groups for parameter in group.params)
    plain = (recipe.module, recipe.name) == ("torch.optim", "AdamW")
    return {"fused": True} if plain and on_gpu and not chosen else {}


def _settle_adafactor(
    arguments: dict[str, object], config: OptimizerConfig, notices: tuple[str, ...]
) -> tuple[bool, tuple[str, ...]]:
    """Apply Kohya's rules for Adafactor to `arguments`; True if it sets its own learning rate."""
    if arguments.get("warmup_init") and not arguments["relative_step"]:
        arguments["relative_step"] = True
        notices += ("Adafactor: warmup_init=True works with relative_step=True only, so that is switched on",)
    if arguments["relative_step"]:
        return True, (
            *notices,
            "Adafactor with relative_step=True sets its own learning rate: learning_rate, unet_lr, "
            "text_encoder_lr and lr_scheduler have no effect; optimizer_args relative_step=False uses them",
        )
    if config.max_grad_norm != 0 and arguments.get("clip_threshold", 1.0) == 1.0:
        notices += (
            "Adafactor clips its own updates (clip_threshold); max_grad_norm = 0 avoids clipping twice",
        )
    return False, notices


def _check_adaptive(recipe: Recipe, rates: Sequence[float]) -> tuple[str, ...]:
    """Notices on learning rates that defeat Prodigy or D-Adaptation; refuse those that their step refuses."""
    notices: tuple[str, ...] = ()
    if rates[0] <= 0.1:
        notices += (
            f"{recipe.name} multiplies its own step size by the learning rate {rates[0]:g}; use about 1",
        )
    different = sorted({rate for rate in rates if rate})
    if len(different) > 1:
        listed = ", ".join(map(str, different))
        sentence = f"{recipe.name} needs one learning rate for all groups, these are {listed}"
        if recipe.needs_one_rate:
            raise ConfigError(
                f"{sentence}; set unet_lr and text_encoder_lr equal (or 0) and leave out LoRA+ ratios"
            )
        notices += (f"{sentence}; it takes the largest",)
    return notices


def _entries(
    groups: Sequence[ParameterGroup], learning_rate: float, *, relative: bool
) -> list[dict[str, object]]:
    """The groups as optimizers take them, each with a name of its own."""
    entries: list[dict[str, object]] = []
    seen: dict[str, int] = {}
    for group in groups:
        seen[group.name] = seen.get(group.name, 0) + 1
        name = group.name if seen[group.name] == 1 else f"{group.name} ({seen[group.name]})"
        entry: dict[str, object] = {"name": name, "params": list(group.params)}
        if not relative:
            entry["lr"] = learning_rate if group.lr is None else group.lr
        entries.append(entry)
    return entries


def _construct(
    kind: type, entries: list[dict[str, object]], learning_rate: float | None, arguments: Mapping[str, object]
) -> torch.optim.Optimizer:
    """Make the optimizer; what its constructor refuses is the user's to mend."""
    try:
        return cast(torch.optim.Optimizer, kind(entries, lr=learning_rate, **arguments))
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        given = ", ".join(f"{key}={value}" for key, value in arguments.items())
        raise ConfigError(
            f"{kind.__name__} refuses learning_rate {learning_rate} and optimizer_args ({given}): {error}"
        ) from error


def _describe(kind: type, arguments: Mapping[str, object]) -> str:
    text = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"{kind.__module__}.{kind.__name__}" + (f"({text})" if text else "")
