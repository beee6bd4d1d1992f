"""Every key with one letter left out, doubled, swapped or replaced is refused with the name that was meant."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator

import pytest

from library.config.cli import Given, make_parser, parse
from library.config.dataset_keys import DATASET, GENERAL, KEYS, MUSUBI, SUBSET, Place, read_table
from library.config.foreign import ALIASES, NETWORK_ARGUMENTS, OLD_SWAP_KEYS, WITHOUT_EFFECT
from library.config.notices import Notices
from library.config.strangers import place_strangers
from library.config.train_config import OPTIONS
from library.errors import ConfigError

FOREIGN = {*ALIASES, *NETWORK_ARGUMENTS, *OLD_SWAP_KEYS, *WITHOUT_EFFECT}
LETTERS = "abcdefghijklmnopqrstuvwxyz_0123456789"


def slips(name: str) -> Iterator[str]:
    """All names one slip away; each letter is replaced by one that its place and the name decide."""
    generator = random.Random(name)
    for i, letter in enumerate(name):
        yield name[:i] + name[i + 1 :]
        yield name[:i] + letter + name[i:]
        yield name[:i] + name[i + 1 : i + 2] + letter + name[i + 2 :]
        yield name[:i] + generator.choice(LETTERS.replace(letter, "")) + name[i + 1 :]


def mutants(names, known) -> list[tuple[str, str]]:
    pairs = {(name, wrong) for name in names for wrong in slips(name)}
    return sorted((name, wrong) for name, wrong in pairs if wrong not in known and wrong not in ("", "help"))


def suggested(error: pytest.ExceptionInfo[ConfigError]) -> list[str]:
    message = str(error.value)
    assert "\n" not in message
    return re.findall(r"'(\w+)'", message.partition("; did you mean ")[2])


def test_in_the_config_file():
    pairs = mutants(OPTIONS, {*OPTIONS, *FOREIGN})
    assert len(pairs) > 12_000
    for name, wrong in pairs:
        with pytest.raises(ConfigError) as caught:
            place_strangers({wrong: Given("1", "train.toml [some] line 12")}, {}, Notices())
        assert name in suggested(caught), (name, wrong)
        assert str(caught.value).startswith(f"train.toml [some] line 12: unknown option {wrong!r}; ")


def test_on_the_command_line():
    """A beginning of a name is an abbreviation there, as in Kohya's parser, if no other name begins so."""
    flags = {*OPTIONS, "help"}
    for name, wrong in mutants(OPTIONS, {*OPTIONS, *FOREIGN}):
        begun = sorted(other for other in flags if other.startswith(wrong))
        words = [f"--{wrong}"] if OPTIONS[name].type == "bool" else [f"--{wrong}", "1"]
        if len(begun) == 1:
            assert make_parser().parse_known_args([f"--{wrong}=1"] if words[1:] else words)[1] == []
            assert begun == [name]
            continue
        with pytest.raises(ConfigError) as caught:
            parse(words, Notices())
        if begun:
            listed = re.findall(r"--(\w+)", str(caught.value).partition(" could match ")[2])
            assert sorted(listed) == begun
        else:
            assert name in suggested(caught), (name, wrong)


@pytest.mark.parametrize("level", [GENERAL, DATASET, SUBSET])
def test_in_a_dataset_file(level):
    names = [name for name, key in KEYS.items() if level in key.levels]
    place = Place("data.toml [[datasets]] 1", ("datasets", 0), {("datasets", 0): [7]})
    pairs = mutants(names, {*KEYS, *MUSUBI})
    assert len(pairs) > 1_000
    for name, wrong in pairs:
        with pytest.raises(ConfigError) as caught:
            read_table({wrong: 1}, level, place)
        assert name in suggested(caught), (name, wrong)
        assert str(caught.value).startswith(f"data.toml [[datasets]] 1 (line 7): unknown key {wrong!r}; ")


@pytest.mark.parametrize("wrong", ["dataset", "datasetss", "dtaasets", "genral", "generall", "General"])
def test_tables_of_a_dataset_file(wrong, tmp_path):
    from library.config.dataset_file import read_dataset_file

    path = tmp_path / "data.toml"
    path.write_text(f"[{wrong}]\n")
    with pytest.raises(ConfigError, match=rf"data.toml line 1: '{wrong}' stands outside .* did you mean '"):
        read_dataset_file(path, masked_loss=False)
