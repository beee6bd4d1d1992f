"""Checks of the options for the average of weights and for what validation decides."""

from __future__ import annotations

from library.config.rule_context import Context
from library.errors import ConfigError


def average_is_asked_for(context: Context) -> None:
    """Options of the average need one; an optimizer that averages leaves nothing to average."""
    averaging = context.config.averaging
    if averaging.ema_decay is None:
        for name in ("ema_on_cpu", "ema_for_samples"):
            if context.config.value(name):
                raise ConfigError(
                    f"{context.said(name)} needs ema_decay: give it, such as 0.99, or leave {name} out"
                )
    elif (context.config.optimizer.optimizer_type or "").lower().endswith("schedulefree"):
        raise ConfigError(
            f"{context.said('ema_decay')} with {context.said('optimizer_type')}, which averages the weights itself "
            "and saves the average: leave ema_decay out"
        )


def difference_has_a_patience(context: Context) -> None:
    """A least improvement does nothing without early stopping."""
    validation = context.config.validation
    if validation.early_stop_min_delta and validation.early_stop_patience is None:
        context.notices.remarks.append("without early_stop_patience no effect: early_stop_min_delta")


AVERAGING_RULES = (average_is_asked_for, difference_has_a_patience)
