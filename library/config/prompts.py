"""Prompts of sample pictures: .txt, .toml and .json files, lines, or literal text, as Kohya reads them.

Read here, drawn elsewhere. Flags that have no meaning for FLUX and flags that do not exist are reported with
what may have been meant; the reference drops both in silence. An indented `#` begins a comment, too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

from library.config.kinds import local_path
from library.config.names import suggestion
from library.config.toml_file import parse_toml, read_text
from library.errors import ConfigError

MIN_SIDE = 64  # pixels
SIDE_STEP = 16  # pixels: a transformer token is 16 pixels wide
MAX_STEPS = 1000
MAX_SEED = 2**63 - 1
DEFAULT_GUIDANCE = 3.5


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplePrompt:
    """One picture to draw. Sides are pixels, multiples of 16; `scale` 1 means no classifier-free guidance."""

    index: int  # place in the file, part of the picture's file name
    prompt: str
    negative_prompt: str = ""  # used only if `scale` is not 1
    width: int = 512
    height: int = 512
    seed: int | None = None
    sample_steps: int = 20
    scale: float = 1.0  # classifier-free guidance: two passes a step
    guidance_scale: float = DEFAULT_GUIDANCE  # the guidance that FLUX.1 dev was distilled with, one pass
    strength: float = 1.0  # of the network; 0 draws the base model

    @property
    def is_guided(self) -> bool:
        """Whether classifier-free guidance is on, and so whether the negative prompt counts."""
        return self.scale != 1


@dataclass(frozen=True, slots=True)
class LoadedPrompts:
    """The prompts in order, and what had to be said about them."""

    prompts: tuple[SamplePrompt, ...]
    notices: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Flag:
    """A flag of a prompt line: the pattern of its value, the field it sets and how the value is read."""

    pattern: str
    field: str
    read: Callable[[str], int | float | str]


FLAGS: dict[str, Flag] = {
    "w": Flag(r"\d+", "width", int),
    "h": Flag(r"\d+", "height", int),
    "d": Flag(r"\d+", "seed", int),
    "s": Flag(r"\d+", "sample_steps", int),
    "l": Flag(r"\d+\.?\d*|\.\d+", "scale", float),
    "g": Flag(r"\d+\.?\d*|\.\d+", "guidance_scale", float),
    "n": Flag(r".+", "negative_prompt", str),
}
# Not in Kohya's prompt files, where such a part is ignored; Kohya's drawing script for FLUX takes the letter so.
OUR_FLAGS: dict[str, Flag] = {"m": Flag(r"-?\d+\.?\d*|-?\.\d+", "strength", float)}

# Kohya's flags and keys for other model families
FLAGS_WITHOUT_EFFECT = ("ss", "cn", "ctr", "rcfg", "fs")
KEYS_WITHOUT_EFFECT = ("sample_sampler", "controlnet_image", "cfg_trunc_ratio", "renorm_cfg", "flow_shift")

# What other programs call it -> what it may mean here
MEANINGS: Mapping[str, tuple[str, ...]] = {
    "cfg": ("l", "g"),
    "cfg_scale": ("l", "g"),
    "scale": ("l", "g"),
    "guidance": ("g",),
    "guidance_scale": ("g",),
    "steps": ("s",),
    "num_inference_steps": ("s",),
    "seed": ("d",),
    "width": ("w",),
    "height": ("h",),
    "neg": ("n",),
    "negative": ("n",),
    "negative_prompt": ("n",),
    "no": ("n",),
    "lora_strength": ("m",),
    "multiplier": ("m",),
    "network_multiplier": ("m",),
}
ABOUT: Mapping[str, str] = {"l": " (classifier-free guidance)", "g": " (FLUX dev's distilled guidance)"}
KEYS: Mapping[str, type] = {
    "prompt": str,
    "negative_prompt": str,
    "width": int,
    "height": int,
    "seed": int,
    "sample_steps": int,
    "scale": float,
    "guidance_scale": float,
    "strength": float,
}

TYPES: Mapping[type, str] = {str: "text", int: "a whole number", float: "a number"}


def load_prompts(source: str | Path | Sequence[str]) -> LoadedPrompts:
    """Prompts from a file (.txt, .toml, .json), from lines, or from literal text.

    A name that ends like a prompt file but does not exist, and a file that cannot be read, are a
    `ConfigError`.
    """
    if isinstance(source, Sequence) and not isinstance(source, str):
        return _collect([_from_line(line) for line in _lines("\n".join(source))], "sample_prompts")
    path = local_path(str(source))
    reader = _READERS.get(path.suffix.lower())
    if _is_folder(path):
        raise ConfigError(
            f"sample_prompts {path}: this is a folder; name a prompt file in it, or write a prompt"
        )
    if reader is None and not _is_file(path):
        return _collect([_from_line(line) for line in _lines(str(source))], "sample_prompts")
    if reader is None:
        raise ConfigError(f"sample_prompts {path}: a prompt file ends in {', '.join(_READERS)}")
    return _collect(reader(read_text(path), path), str(path))


def prompt_file(source: str | Path | Sequence[str]) -> Path | None:
    """The file that `source` names, as `load_prompts` takes it; None for lines and literal text."""
    if isinstance(source, Sequence) and not isinstance(source, str):
        return None
    path = local_path(str(source))
    return path if path.suffix.lower() in _READERS and _is_file(path) else None


def _is_file(path: Path) -> bool:
    """A long text is no file name, and asking the system about it is an error of its own."""
    try:
        return path.is_file()
    except OSError:
        return False


def _is_folder(path: Path) -> bool:
    try:
        return path.is_dir()
    except OSError:
        return False


@dataclass(slots=True)
class Entry:
    """One prompt as it is being read."""

    values: dict[str, int | float | str]
    notices: list[str]


def _lines(text: str) -> list[str]:
    stripped = (line.strip() for line in text.splitlines())
    return [line for line in stripped if line and not line.startswith("#")]


def _from_line(line: str) -> Entry:
    """Split a line at its flags. Kohya looks for a flag at the start of the prompt as well, and so do we,
    aloud.
    """
    prompt, *parts = line.split(" --")
    entry = Entry({"prompt": prompt.strip()}, [])
    if _apply_flag(prompt, entry, FLAGS):
        entry.notices.append(
            f'the prompt itself begins with "{prompt[:20]}", which is read as the flag --{prompt[0]}, as in '
            "Kohya; begin with another word if that is not meant"
        )
    known = FLAGS | OUR_FLAGS
    for part in parts:
        name, _, value = part.strip().partition(" ")
        if name.lower() in FLAGS_WITHOUT_EFFECT:
            entry.notices.append(f"--{name} has no effect on FLUX")
        elif name.lower() not in known:
            meant = " or ".join(f"--{flag}{ABOUT.get(flag, '')}" for flag in MEANINGS.get(name.lower(), ()))
            hint = f"; did you mean {meant}?" if meant else f"; flags are --{', --'.join(known)}"
            entry.notices.append(f'"--{part.strip()}" is not a known flag and is ignored{hint}')
        elif not _apply_flag(part.strip(), entry, known):
            entry.notices.append(f'"--{part.strip()}" is ignored: "{value}" is not a value of --{name}')
    return entry


def _apply_flag(part: str, entry: Entry, flags: Mapping[str, Flag]) -> bool:
    """Set the field of the flag that `part` ("w 512") begins with; False if it is none or its value is
    malformed.
    """
    for name, flag in flags.items():
        match = re.match(rf"{name}\s+({flag.pattern})", part, re.IGNORECASE)
        if match:
            entry.values[flag.field] = flag.read(match[1].strip())
            return True
    return False


def _from_txt(text: str, _path: Path) -> list[Entry]:
    return [_from_line(line) for line in _lines(text)]


def _from_toml(text: str, path: Path) -> list[Entry]:
    """[prompt] holds what the [[prompt.subset]] entries share; an entry's own value wins."""
    common = parse_toml(text, path).get("prompt")
    subsets = common.get("subset", [{}]) if isinstance(common, dict) else None
    if not isinstance(common, dict) or not _all_tables(subsets):
        raise ConfigError(
            f"sample_prompts {path}: a .toml prompt file needs a [prompt] table, with [[prompt.subset]] entries"
        )
    shared = {key: value for key, value in common.items() if key != "subset"}
    return [_from_table({**shared, **subset}, path) for subset in subsets]


def _all_tables(value: object) -> TypeGuard[list[dict[str, Any]]]:
    return isinstance(value, list) and all(isinstance(one, dict) for one in value)


def _from_json(text: str, path: Path) -> list[Entry]:
    try:
        entries = json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"sample_prompts {path}: this is not JSON ({error})") from error
    if not isinstance(entries, list) or not all(isinstance(one, (str, dict)) for one in entries):
        raise ConfigError(f"sample_prompts {path}: a .json prompt file is a list of texts or objects")
    return [_from_line(one.strip()) if isinstance(one, str) else _from_table(one, path) for one in entries]


_READERS: Mapping[str, Callable[[str, Path], list[Entry]]] = {
    ".txt": _from_txt,
    ".toml": _from_toml,
    ".json": _from_json,
}


def _from_table(table: Mapping[str, object], path: Path) -> Entry:
    """An entry whose keys are the field names; `path` is for the message."""
    entry = Entry({}, [])
    for key, value in table.items():
        kind = KEYS.get(key)
        if key in KEYS_WITHOUT_EFFECT:
            entry.notices.append(f"{key} has no effect on FLUX")
        elif kind is None:
            meant = " or ".join(
                (FLAGS | OUR_FLAGS)[flag].field + ABOUT.get(flag, "") for flag in MEANINGS.get(key, ())
            )
            hint = f"; did you mean {meant}?" if meant else suggestion(key, KEYS)
            entry.notices.append(
                f"{key} is not a known key and is ignored{hint or '; keys are ' + ', '.join(KEYS)}"
            )
        elif isinstance(value, bool) or not isinstance(value, (int, float) if kind is float else kind):
            raise ConfigError(f"sample_prompts {path}: {key} = {value!r} is not {TYPES[kind]}")
        elif isinstance(value, (int, float, str)):
            entry.values[key] = value
    return entry


def _side(pixels: int) -> int:
    return max(MIN_SIDE, pixels - pixels % SIDE_STEP)


def _finish(index: int, values: Mapping[str, Any]) -> SamplePrompt:
    """The entry as a prompt, sides and steps brought into range."""
    prompt = SamplePrompt(index=index, **values)
    return replace(
        prompt,
        width=_side(prompt.width),
        height=_side(prompt.height),
        sample_steps=max(1, min(MAX_STEPS, prompt.sample_steps)),
    )


def _guidance_notice(entry: Entry) -> None:
    if entry.values.get("scale", 1) != 1 and "guidance_scale" not in entry.values:
        entry.notices.append(
            f"--l {entry.values['scale']} (scale) is true classifier-free guidance, two passes a step; FLUX dev's "
            f"own guidance is --g (guidance_scale), {DEFAULT_GUIDANCE} if not given"
        )


def _collect(entries: Sequence[Entry], where: str) -> LoadedPrompts:
    """Number the entries, bring sides and steps into range, and say where each notice belongs."""
    if not entries:
        raise ConfigError(f"sample_prompts {where}: there is no prompt in it")
    for number, entry in enumerate(entries, start=1):
        if "prompt" not in entry.values:
            raise ConfigError(f'sample_prompts {where}: entry {number} has no "prompt"')
        if not 0 <= int(entry.values.get("seed", 0)) <= MAX_SEED:
            raise ConfigError(f"sample_prompts {where}: the seed of entry {number} is not in 0..{MAX_SEED}")
        _guidance_notice(entry)
    return LoadedPrompts(
        prompts=tuple(_finish(index, entry.values) for index, entry in enumerate(entries)),
        notices=tuple(
            f"{where}, prompt {number}: {notice}"
            for number, entry in enumerate(entries, start=1)
            for notice in entry.notices
        ),
    )
