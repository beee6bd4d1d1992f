"""What holds for any options: they survive a file, the command line and --output_config; the nearest place wins."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.config.implied import IMPLICATIONS
from library.config.load import load_config, read_options
from library.config.notices import Notices
from library.config.options import SECRETS, Option
from library.config.show import output_config
from library.config.train_config import OPTIONS

TEXT = st.text(st.characters(exclude_categories=["C"]), min_size=1, max_size=12).filter(
    lambda text: text.strip() == text and not text.startswith(("-", "~"))
)
LINE = st.text(
    st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), min_size=1, max_size=12
).filter(lambda text: not text.startswith("-"))
PATHS = st.lists(TEXT.filter(lambda text: text not in (".", "..")), min_size=1, max_size=3).map(
    lambda parts: Path(*(part.replace("/", "_") for part in parts))
)
ARGUMENT = st.builds("{}={}".format, st.from_regex(r"[a-z_]{1,8}", fullmatch=True), st.sampled_from(
    ["True", "0.1", "(0.9,0.999)", "a b", "x=y", "[1,2]", "é,ü", '"q"']
))  # fmt: skip
FLOATS = st.floats(0, 1e6, allow_nan=False, allow_infinity=False)


def bounded(item: Option, *, whole: bool) -> st.SearchStrategy[float]:
    limit = item.row.limit
    low = limit.ge if limit.ge is not None else limit.gt if limit.gt is not None else -1e6
    high = limit.le if limit.le is not None else low + 1e6
    if whole:
        return st.integers(int(low) + (limit.gt is not None), int(high))
    floats = st.floats(low, high, allow_nan=False, exclude_min=limit.gt is not None)
    # argparse takes -1e-05 for an option, as it does in Kohya's trainer
    return floats.map(lambda number: round(number, 3) if number < 0 else number)


def values_of(item: Option) -> st.SearchStrategy[object]:
    """Values of the option as the trainer holds them."""
    if item.row.choices:
        return st.sampled_from(item.row.choices)
    return {
        "bool": st.booleans(),
        "int": bounded(item, whole=True),
        "GpuCount": bounded(item, whole=True),
        "BlockCount": st.one_of(bounded(item, whole=True), st.just("auto")),
        "float": bounded(item, whole=False),
        "int | float": st.one_of(st.integers(0, 10**6), st.floats(1e-6, 0.999)),
        "str": LINE,
        "PromptText": LINE,
        "ModelName": TEXT,
        "Path": PATHS,
        "tuple[int, int]": st.tuples(st.integers(1, 4096), st.integers(1, 4096)),
        "tuple[float, float]": st.tuples(FLOATS, FLOATS).map(lambda pair: (min(pair), max(pair))),
        "tuple[str, ...]": st.lists(ARGUMENT, min_size=1, max_size=3).map(tuple),
        "tuple[Path, ...]": st.lists(PATHS, min_size=1, max_size=3).map(tuple),
        "tuple[float, ...]": st.lists(bounded(item, whole=False), min_size=1, max_size=2).map(tuple),
    }[item.type]


# Options that set others have tests of their own; the file itself is no value in a file.
APART = {"config_file", "output_config", "strict_config", *(rule.option for rule in IMPLICATIONS)}
FREE = [
    item for name, item in OPTIONS.items()
    if item.row.effect.state == "used" and not item.row.effect.refused_values and name not in APART
]  # fmt: skip


@st.composite
def configs(draw: st.DrawFn) -> dict[str, object]:
    items = draw(st.lists(st.sampled_from(FREE), min_size=1, max_size=12, unique_by=lambda item: item.name))
    drawn = {item.name: draw(values_of(item)) for item in items}
    return {name: value for name, value in drawn.items() if value not in OPTIONS[name].row.unset}


def in_toml(value: object) -> str:
    """A value as a user would write it in TOML."""
    return json.dumps(value, default=str, ensure_ascii=False).replace("\x7f", "\\u007f")


def file_text(values: dict[str, object], sections: tuple[str, ...]) -> str:
    """The values spread over tables in turn; without names of tables a flat file."""
    tables: dict[str, list[str]] = {name: [] for name in sections or ("",)}
    for index, (name, value) in enumerate(values.items()):
        tables[list(tables)[index % len(tables)]].append(f"{name} = {in_toml(value)}  # why\n")
    return "".join((f"[{name}]\n" if name else "") + "".join(lines) for name, lines in tables.items())


def words_of(values: dict[str, object]) -> list[str]:
    words: list[str] = []
    for name, value in values.items():
        item = OPTIONS[name]
        if item.type == "bool":
            words += [f"--{name}"] if value else []
        elif item.kind.many:
            words += [f"--{name}", *(str(one) for one in value)]  # type: ignore[attr-defined]
        elif isinstance(value, tuple):
            words.append(f"--{name}={','.join(map(str, value))}")
        else:
            words.append(f"--{name}={value}")
    return words


def options_of(*words: str) -> dict[str, object]:
    values, _, _ = read_options(words, Notices())
    return {name: value for name, value in values.items() if name != "config_file"}


@pytest.fixture(scope="module")
def path():
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "train.toml"


many = settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
SECTIONS = st.lists(st.from_regex(r"[a-z_]{1,6}_section", fullmatch=True), max_size=3, unique=True).map(tuple)


@many
@given(values=configs(), sections=SECTIONS)
def test_a_file_gives_back_what_was_written_whatever_its_tables_are_called(path, values, sections):
    path.write_text(file_text(values, sections), encoding="utf-8", newline="\r\n")
    assert options_of("--config_file", str(path)) == values


@many
@given(values=configs())
def test_the_command_line_gives_back_what_was_written(values):
    assert options_of(*words_of(values)) == {
        name: value for name, value in values.items() if value is not False
    }


@many
@given(written=configs(), typed=configs())
def test_command_line_beats_file_beats_default(path, written, typed):
    path.write_text(file_text(written, ("a_section", "b_section")), encoding="utf-8")
    typed = {name: value for name, value in typed.items() if value is not False}
    values, sources, _ = read_options(["--config_file", str(path), *words_of(typed)], Notices())
    for name, item in OPTIONS.items():
        if name != "config_file":
            default = item.row.default
            assert values.get(name, default) == {name: default, **written, **typed}[name]
            place = sources.get(name, "")
            assert (place == "command line") == (name in typed)
            assert place.startswith("train.toml [") == (name in written and name not in typed)


@many
@given(values=configs())
def test_output_config_reads_back(path, values):
    path.unlink(missing_ok=True)
    words = [*words_of(values), "--config_file", str(path), "--output_config"]
    target, text = output_config(load_config(words))
    target.write_text(text, encoding="utf-8")
    kept = {
        name: value for name, value in values.items()
        if name not in SECRETS | {"dry_run"} and value != OPTIONS[name].row.default
    }  # fmt: skip
    assert options_of("--config_file", str(path)) == kept
