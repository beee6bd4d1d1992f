"""Classes that an option names, and their arguments given as text: shared by optimizers and schedulers.

Arguments are read more leniently than in the reference, where each of these stops the run or, worse, means
something else: `relative_step=False,` is False (not a truthy tuple), `true` is True, a list is as good as a
tuple, a value may contain `=`, and a bare word is a string. Every repair is reported.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import inspect
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from library.errors import ConfigError, EnvironmentUnsupported

_WORDS: Mapping[str, object] = {"true": True, "false": False, "none": None, "null": None}
_BARE_STRING = re.compile(r"[A-Za-z0-9][\w.:,/+-]*")

# Import name -> name on PyPI, where they differ
PIP_NAMES: Mapping[str, str] = {
    "prodigyplus": "prodigy-plus-schedule-free",
    "pytorch_optimizer": "pytorch-optimizer",
    "lion_pytorch": "lion-pytorch",
    "torch_optimizer": "torch-optimizer",
}


@dataclass(frozen=True, slots=True)
class Arguments:
    """Parsed `key=value` texts and what had to be said about them."""

    values: Mapping[str, object]
    notices: tuple[str, ...]


def nearest(name: str, known: Collection[str]) -> str:
    """ ", did you mean A or B?" or a list of everything known: the end of a sentence that refuses `name`."""
    close = closest(name, known, cutoff=0.55)
    return f"did you mean {' or '.join(close)}?" if close else listed(known)


def closest(name: str, known: Iterable[str], *, cutoff: float) -> list[str]:
    """At most three of the names in `known`, the most alike first; a `cutoff` of 0 finds some for any name."""
    by_lower = {one.lower(): one for one in known}
    return [by_lower[one] for one in difflib.get_close_matches(name.lower(), by_lower, n=3, cutoff=cutoff)]


def listed(known: Iterable[str]) -> str:
    """ "known are A, B, C": all names in alphabetical order."""
    return f"known are {', '.join(sorted(known, key=str.lower))}"


def parse_arguments(texts: Sequence[str], *, option: str) -> Arguments:
    """Read `key=value` texts of `option`; a text that cannot be read is a `ConfigError`."""
    values: dict[str, object] = {}
    notices: list[str] = []
    for text in texts:
        key, equals, written = (part.strip() for part in text.partition("="))
        if not equals or not key.isidentifier():
            raise ConfigError(f'{option}: "{text}" is not of the form key=value')
        if key in values:
            notices.append(f"{option}: {key} is given more than once; the last value is used")
        values[key], notice = _read_value(written, f"{option}: {key}={written}")
        if notice is not None:
            notices.append(notice)
    return Arguments(values, tuple(notices))


def _read_value(written: str, where: str) -> tuple[object, str | None]:
    """The value, and a notice where the reference would have read it otherwise or not at all."""
    trimmed = written.rstrip(",").rstrip()
    notice = (
        None if trimmed == written else f"{where}: the comma at the end is ignored, the value is {trimmed}"
    )
    if trimmed.lower() in _WORDS:
        value = _WORDS[trimmed.lower()]
        if trimmed != str(value):
            notice = f"{where} is read as {value}"
        return value, notice
    try:
        value = ast.literal_eval(trimmed)
    except (ValueError, SyntaxError) as error:
        if not _BARE_STRING.fullmatch(trimmed):
            raise ConfigError(
                f"{where} is not a number, True, False, None, a quoted text or a tuple"
            ) from error
        return trimmed, f"{where} is read as the text '{trimmed}'"
    return (tuple(value) if isinstance(value, list) else value), notice


def import_class(module: str, name: str, *, option: str) -> type:
    """The class `name` of `module`; what is missing is named with the package to install."""
    top = module.partition(".")[0]
    if not top:
        raise ConfigError(f"{option}: {module}.{name} is not of the form module.Class")
    try:
        found = getattr(importlib.import_module(module), name, None)
    except ImportError as error:
        package = PIP_NAMES.get(top, top.replace("_", "-"))
        raise EnvironmentUnsupported(
            f"{option} needs the Python module {module}, which cannot be imported ({error}); "
            f"pip install {package}"
        ) from error
    if not inspect.isclass(found):
        raise ConfigError(
            f"{option}: module {module} has no class {name}; {nearest(name, classes_of(module))}"
        )
    return found


def classes_of(module: str) -> tuple[str, ...]:
    """Names of the public classes of an importable module, without those it has from other packages."""
    package = module.partition(".")[0]
    members = inspect.getmembers(importlib.import_module(module), inspect.isclass)
    own = [name for name, kind in members if kind.__module__.partition(".")[0] == package]
    return tuple(name for name in own if not name.startswith("_"))


def check_arguments(
    names: Iterable[str], *, target: type, option: str, reserved: Mapping[str, str], own: Collection[str] = ()
) -> None:
    """Refuse argument `names` that `target` does not take, or that another option gives.

    `reserved` maps an argument to the option it comes from; `own` are set by the trainer and cannot be given.
    """
    parameters = inspect.signature(target).parameters
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters.values())
    positional_only = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    accepted = [
        name
        for name, one in parameters.items()
        if one.kind not in positional_only and name not in reserved and name not in own
    ]
    for name in names:
        if name in reserved:
            raise ConfigError(f"{option}: {name} comes from {reserved[name]}; give it there")
        if name not in accepted and (not takes_any or name in own):
            raise ConfigError(
                f"{option}: {target.__name__} has no argument {name}; it takes {', '.join(accepted)}"
            )
