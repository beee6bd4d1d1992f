"""Reading a JSON or YAML config of another program: which one it is, by its content, and what it says here.

JSON with trailing commas is read too, as SimpleTuner's own examples have them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from library.config.importers import ai_toolkit, ai_toolkit_server, kohya_gui, replicate, simpletuner
from library.config.importers.rules import Imported
from library.config.toml_file import read_text
from library.errors import ConfigError

Converter = Callable[[Mapping[str, Any], simpletuner.Reader], Imported]


@dataclass(frozen=True, slots=True)
class Source:
    """A program whose configs are read."""

    kind: str
    recognises: Callable[[object], bool]
    convert: Converter


def _alone(convert: Callable[[Mapping[str, Any]], Imported]) -> Converter:
    """A converter of configs that name no other files to read."""
    return lambda content, _read: convert(content)


SOURCES = (
    Source(ai_toolkit.KIND, ai_toolkit.recognises, _alone(ai_toolkit.convert)),
    Source(simpletuner.KIND, simpletuner.recognises, simpletuner.convert),
    Source(kohya_gui.KIND, kohya_gui.recognises, _alone(kohya_gui.convert)),
    Source(replicate.KIND, replicate.recognises, _alone(replicate.convert)),
    Source(ai_toolkit_server.KIND, ai_toolkit_server.recognises, _alone(ai_toolkit_server.convert)),
)

# Files that people take for a config of the trainer: a test of the keys, and what to say.
_STRANGERS: tuple[tuple[frozenset[str], str], ...] = (
    (
        frozenset({"compute_environment"}),
        "accelerate's own config; give it to accelerate launch --config_file",
    ),
    (frozenset({"distributed_type"}), "accelerate's own config; give it to accelerate launch --config_file"),
    (frozenset({"datasets"}), "a dataset file; name it as dataset_config"),
    (frozenset({"algo", "linear_dim"}), "SimpleTuner's LyCORIS settings; give the config.json that names it"),
    (frozenset({"training_method", "concepts"}), "a preset of OneTrainer, which cannot be read"),
    (frozenset({"training_method", "learning_rate"}), "a preset of OneTrainer, which cannot be read"),
    (frozenset({"nodes", "links"}), "a workflow of ComfyUI, which trains nothing"),
    (
        frozenset({"architectures"}),
        "the config.json of a model; give the folder as pretrained_model_name_or_path",
    ),
    (
        frozenset({"_class_name"}),
        "a part of a diffusers model; give the folder as pretrained_model_name_or_path",
    ),
    (frozenset({"peft_type"}), "the config of a PEFT adapter; give its .safetensors file as network_weights"),
)


def import_file(path: Path) -> Imported:
    """The options of another program's config. Raises ConfigError, naming the file, for what cannot be read."""
    content = _content(path)
    source = next((one for one in SOURCES if one.recognises(content)), None)
    if source is None:
        raise ConfigError(f"{path}: {_stranger(content)}")
    try:
        return source.convert(content, lambda name: _content(_beside(path, name)))
    except ConfigError as error:
        raise ConfigError(f"{path.name}: {error}") from None
    except (TypeError, ValueError, AttributeError, LookupError, OverflowError) as error:
        # A table where a value is expected, or the other way round: the converters take a program's own shape.
        raise ConfigError(
            f"{path.name} looks like a config of {source.kind}, but a value has not the shape it has there ({error})"
        ) from None


def _beside(path: Path, name: str) -> Path:
    """A file named in the config: from the working folder, else from the config's folder or the one above it."""
    places = (
        Path(name).expanduser(),
        path.parent / name,
        path.parent.parent / name,
        path.parent / Path(name).name,
    )
    return next((place for place in places if place.is_file()), places[0])


def _content(path: Path) -> Any:
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if path.suffix.lower() == ".json" and (not text.strip() or not _only_a_comma(text)):
            where = f"{path} line {error.lineno}, column {error.colno}"
            raise ConfigError(f"{where}: this is not JSON ({error.msg})") from None
    try:
        return yaml.safe_load(text.replace("\t", "    ") if path.suffix.lower() == ".json" else text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        raise ConfigError(f"{path}{where}: this is not YAML ({getattr(error, 'problem', error)})") from None


def _only_a_comma(text: str) -> bool:
    """Whether a text that is not JSON becomes JSON when commas before closing brackets are taken out."""
    try:
        return (
            isinstance(yaml.safe_load(text.replace("\t", "    ")), (dict, list)) and text.lstrip()[0] in "{["
        )
    except yaml.YAMLError:
        return False


def _stranger(content: object) -> str:
    known = ", ".join(source.kind for source in SOURCES)
    if isinstance(content, list) and any(
        isinstance(one, dict) and "instance_data_dir" in one for one in content
    ):
        return "this looks like SimpleTuner's list of datasets; give the config.json that names it"
    if isinstance(content, dict):
        for signs, what in _STRANGERS:
            if signs <= content.keys():
                return f"this looks like {what}"
        if content and all(isinstance(one, dict) and "class_type" in one for one in content.values()):
            return "this looks like a workflow of ComfyUI, which trains nothing"
    return f"this is none of the configs that can be read: a TOML file of options, or one of {known}"
