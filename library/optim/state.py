"""What an optimizer remembers, as named tensors and JSON, independent of process, rank and parameter order.

`torch`'s own `state_dict` numbers parameters by position and casts state to the parameter's dtype when it is
loaded, which ruins 8-bit states. Here every parameter's state lies under the parameter's name, every group's
values under the group's, and tensors come back bit for bit. The same encoding serves learning-rate schedules.

A schedule-free optimizer keeps its mode in its groups: save state and weights in the same mode and restore
both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import torch
from torch import Tensor

from library.errors import CheckpointError

# JSON has no tensors, tuples or keys other than text; a dict with one of these keys stands for what it has
# not.
_TENSOR, _TUPLE, _PAIRS = "tensor", "tuple", "pairs"

# How torch's optimizers compute, not what: the present process's choice, whatever machine the state is from.
_KERNELS = ("fused", "foreach")


class ExportedState(NamedTuple):
    """Tensors on the CPU, sharing no memory, by name; and the rest as JSON values that refer to them."""

    tensors: dict[str, Tensor]
    values: dict[str, object]


ParameterStates = Mapping[Tensor, Mapping[str, object]]  # what is remembered of each parameter, by key


def export_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], states: ParameterStates | None = None
) -> ExportedState:
    """All that `optimizer` remembers; `names` names each of its parameters.

    `states` are the parameters' own where the optimizer runs on other tensors than they (ZeRO's parts).
    """
    tensors: dict[str, Tensor] = {}
    parameters = {
        names[parameter]: to_plain(dict(state), tensors, names[parameter])
        for parameter, state in (optimizer.state if states is None else states).items()
        if state
    }
    groups = {
        group["name"]: to_plain(
            {key: value for key, value in group.items() if key not in ("params", "name")},
            tensors,
            f"group/{group['name']}",
        )
        for group in optimizer.param_groups
    }
    values: dict[str, object] = {"optimizer": _kind(optimizer), "parameters": parameters, "groups": groups}
    return ExportedState(tensors, values)


def import_state(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], exported: ExportedState
) -> None:
    """Put what `export_state` gave into an optimizer of the same kind over parameters of the same names.

    Raises `CheckpointError` if the kind, the groups or the parameters are not the same.
    """
    states = import_groups(optimizer, names, exported)
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter in states:
                optimizer.state[parameter] = {
                    key: _place(key, value, parameter, group) for key, value in states[parameter].items()
                }


def import_groups(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str], exported: ExportedState
) -> ParameterStates:
    """The part of `import_state` that concerns groups; returns the saved states of parameters, on the CPU."""
    if exported.values["optimizer"] != _kind(optimizer):
        raise CheckpointError(
            f"the saved state belongs to the optimizer {exported.values['optimizer']}, this run uses "
            f"{_kind(optimizer)}; resume with the same optimizer_type"
        )
    groups = cast("dict[str, object]", exported.values["groups"])
    present = [group["name"] for group in optimizer.param_groups]
    _require_same("parameter groups", saved=set(groups), present=set(present), all_saved=True)
    parameters = cast("dict[str, object]", exported.values["parameters"])
    _require_same("parameters", saved=set(parameters), present=set(names.values()), all_saved=False)
    for group in optimizer.param_groups:
        kernels = {key: group[key] for key in _KERNELS if key in group}
        saved = cast("dict[str, object]", from_plain(groups[group["name"]], exported.tensors))
        group.update({**saved, **kernels})
    return {
        parameter: cast("dict[str, object]", from_plain(parameters[name], exported.tensors))
        for parameter, name in names.items()
        if name in parameters
    }


def to_plain(value: object, tensors: dict[str, Tensor], name: str) -> object:
    """`value` as JSON; tensors in it go into `tensors` under names that begin with `name`."""
    if isinstance(value, Tensor):
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        return {_PAIRS: [[key, to_plain(one, tensors, f"{name}/{key}")] for key, one in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [to_plain(one, tensors, f"{name}/{index}") for index, one in enumerate(value)]
        return {_TUPLE: items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"{name}: a value of type {type(value).__name__} cannot be saved")


def from_plain(plain: object, tensors: Mapping[str, Tensor]) -> object:
    """The inverse of `to_plain`. Tensors are copies."""
    if isinstance(plain, list):
        return [from_plain(one, tensors) for one in plain]
    if not isinstance(plain, dict):
        return plain
    ((kind, content),) = plain.items()
    if kind == _TENSOR:
        if content not in tensors:
            raise CheckpointError(
                f"the saved optimizer state lacks the tensor {content}; the state is incomplete"
            )
        return tensors[content].clone()
    if kind == _TUPLE:
        return tuple(from_plain(one, tensors) for one in content)
    return {key: from_plain(one, tensors) for key, one in content}


def _place(key: str, value: object, parameter: Tensor, group: Mapping[str, object]) -> object:
    """Tensors go to the parameter's device; torch keeps step counts on the CPU unless kernels read them."""
    if not isinstance(value, Tensor):
        return value
    if key == "step" and not (group.get("capturable") or group.get("fused")):
        return value
    return value.to(parameter.device)


def _require_same(what: str, *, saved: set[str], present: set[str], all_saved: bool) -> None:
    """Every saved name must be present; with `all_saved` the other way round as well."""
    missing = sorted(saved - present)
    new = sorted(present - saved) if all_saved else []
    if missing or new:
        example = (missing or new)[0]
        raise CheckpointError(
            f"the saved optimizer state does not fit this network: {len(missing)} of its {what} are gone and "
            f"{len(new)} are new, for example {example}; resume with the network options it was saved with"
        )


def _kind(optimizer: torch.optim.Optimizer) -> str:
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
