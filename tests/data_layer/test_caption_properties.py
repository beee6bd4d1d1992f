"""The rules of every caption option, alone and in pairs, against a second, plainer account of them."""

from __future__ import annotations

import re
from collections import Counter
from itertools import combinations, product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.config.dataset_settings import SubsetSettings
from library.data.captions import dropped, holds, process_caption, undropped_caption
from library.randomness import Visit, generator

STEPS = 32  # of the run
UNTIL = 16  # steps of token warm-up: a power of two, so that the share of a tag is exact
OPTIONS = {
    "shuffle": {"shuffle_caption": True},
    "keep": {"keep_tokens": 2},
    "mark": {"keep_tokens_separator": "|||"},
    "second": {"secondary_separator": ";;;"},
    "separator": {"caption_separator": "."},
    "wildcard": {"enable_wildcard": True},
    "prefix": {"caption_prefix": "from [trigger]"},
    "suffix": {"caption_suffix": "at night"},
    "thin": {"caption_tag_dropout_rate": 0.5},
    "warm": {"token_warmup_step": UNTIL, "token_warmup_min": 2},
    "warm share": {"token_warmup_step": UNTIL / STEPS, "token_warmup_min": 0},
    "rate": {"caption_dropout_rate": 0.25},
    "epochs": {"caption_dropout_every_n_epochs": 3},
    "trigger": {"trigger_word": "ohwx man"},
}
PAIRS = [*((name,) for name in OPTIONS), *combinations(OPTIONS, 2)]


def options_of(names: tuple[str, ...]) -> SubsetSettings:
    return SubsetSettings(**{key: value for name in names for key, value in OPTIONS[name].items()})


TAGS = st.lists(
    st.sampled_from(
        ["red", "big tree", "sky;;;cloud", "{wet|dry} road", "{{x}}", "Ohwx man", "[trigger] smiling", "lamp"]
    ),
    max_size=7,
    unique=True,
)


@st.composite
def texts(draw: st.DrawFn, options: SubsetSettings) -> str:
    """One to three lines of tags, with up to two marks in each."""
    lines = []
    for _ in range(draw(st.integers(1, 3))):
        tags = draw(TAGS)
        line = f"{options.caption_separator} ".join(tags)
        for _ in range(draw(st.integers(0, 2))):
            line += f" ||| {f'{options.caption_separator} '.join(draw(TAGS))}"
        lines.append(line.strip())
    return "\n".join(lines)


def caption_of(text: str, options: SubsetSettings, *, visit: int, step: int, epoch: int) -> str:
    rng = generator(5, Visit("a", visit), "caption")
    return process_caption(text, options, rng, step=step, max_train_steps=STEPS, epoch=epoch)


def chosen(text: str, options: SubsetSettings) -> set[str]:
    """Every line that the wildcards may come to."""
    text = " ".join(
        part for part in (options.caption_prefix, text, options.caption_suffix) if part is not None
    )
    if not options.enable_wildcard:
        return {text.split("\n")[0]}
    found = set()
    for line in text.split("\n"):
        parts = re.split(r"(?<!\{)\{([^{}]+)\}(?!\})", line)
        choices = [part.split("|") if number % 2 else [part] for number, part in enumerate(parts)]
        found |= {"".join(one).replace("{{", "{").replace("}}", "}") for one in product(*choices)}
    return found


def parts_of(text: str, options: SubsetSettings) -> tuple[list[str], list[str], list[str]]:
    separator, mark = options.caption_separator, options.keep_tokens_separator
    if mark and mark in text:
        pieces = [[t.strip() for t in part.split(separator) if t.strip()] for part in text.split(mark, 2)]
        return pieces[0], pieces[1], (pieces[2:] or [[]])[0]
    tags = [tag.strip() for tag in text.split(separator)]
    return tags[: options.keep_tokens], tags[options.keep_tokens :], []


def obeys(result: str, text: str, options: SubsetSettings, step: int) -> bool:
    """Whether `result` can come of one line, its wildcards decided."""
    trigger = options.trigger_word
    if trigger:
        text = text.replace("[trigger]", trigger)
        if not holds(text, trigger):
            if not result.startswith(trigger):
                return False
            result = result.removeprefix(trigger).removeprefix(", ")

    def shown(tag: str) -> str:
        return tag.replace(";;;", options.caption_separator) if options.secondary_separator else tag

    if not (options.shuffle_caption or options.caption_tag_dropout_rate or options.token_warmup_step):
        return result == shown(text)
    fixed, flexible, suffix = ([shown(tag) for tag in part] for part in parts_of(text, options))
    held = [tag for tag in flexible if trigger and holds(tag, trigger)]
    pool = [tag for n, tag in enumerate(flexible) if n < in_use(len(flexible), options, step) or tag in held]
    tags = result.split(", ") if result or "" in fixed + pool + suffix else []
    end = len(tags) - len(suffix)
    around = tags[: len(fixed)] == fixed and tags[end:] == suffix
    return around and middle_obeys(tags[len(fixed) : end], pool, held, options)


def in_use(count: int, options: SubsetSettings, step: int) -> int:
    """Tags of so many that token warm-up lets through."""
    if not options.token_warmup_step or step >= UNTIL:
        return count
    return step * (count - options.token_warmup_min) // UNTIL + options.token_warmup_min


def middle_obeys(middle: list[str], pool: list[str], held: list[str], options: SubsetSettings) -> bool:
    """Whether the flexible tags are those of the pool, none added, `held` ones there and in place."""
    counts = Counter(middle)
    if counts - Counter(pool) or Counter(held) - counts:
        return False
    if not options.caption_tag_dropout_rate:
        if counts != Counter(pool):
            return False
        if any(tag in held and middle[place] != tag for place, tag in enumerate(pool)):
            return False
    remaining = iter(pool)
    return options.shuffle_caption or all(tag in remaining for tag in middle)  # else in their order


@pytest.mark.parametrize("names", PAIRS, ids="+".join)
def test_rules_hold(names: tuple[str, ...]):
    options = options_of(names)

    @settings(max_examples=12, deadline=None, derandomize=True, database=None)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        text = data.draw(texts(options))
        visit, step, epoch = (data.draw(st.integers(0, top)) for top in (999, STEPS, 6))
        result = caption_of(text, options, visit=visit, step=step, epoch=epoch)
        assert result == caption_of(text, options, visit=visit, step=step, epoch=epoch)
        rng = generator(5, Visit("a", visit), "caption")
        whole = undropped_caption(text, options, rng, step=step, max_train_steps=STEPS)
        assert any(obeys(whole, line, options, step) for line in chosen(text, options)), (text, whole)
        assert result in ("", whole)
        if result != whole:
            assert dropped(options, generator(5, Visit("a", visit), "caption"), epoch=epoch)
        if options.caption_dropout_every_n_epochs:
            assert result == "" or epoch % 3
        if not options.caption_dropout_rate and (not options.caption_dropout_every_n_epochs or epoch % 3):
            assert result == whole

    check()


@pytest.mark.parametrize("other", OPTIONS)
def test_rates_hold_beside_every_option(other: str):
    options = options_of(("rate", "thin", other))
    text = f"{options.caption_separator} ".join("abcdefgh")
    captions = [caption_of(text, options, visit=n, step=STEPS, epoch=1) for n in range(600)]
    share = captions.count("") / len(captions)
    assert 0.25 - 0.09 < share < 0.25 + 0.09  # five standard deviations
    flexible = parts_of(text, options)[1]
    kept = Counter(tag for caption in captions for tag in re.split(r"[,.] |\s", caption) if len(tag) == 1)
    for tag in flexible[:-1] if options.caption_suffix else flexible[1:]:
        assert 0.5 - 0.13 < kept[tag] / (600 - captions.count("")) < 0.5 + 0.13


def test_a_trigger_word_comes_first_only_where_it_lacks():
    options = SubsetSettings(trigger_word="ohwx", shuffle_caption=True, keep_tokens=1)
    firsts = {caption_of("a, b, c", options, visit=n, step=0, epoch=1)[:7] for n in range(20)}
    assert firsts == {"ohwx, a"}  # it does not use up keep_tokens
    plain = SubsetSettings(trigger_word="ohwx")
    for text, caption in [
        ("", "ohwx"),
        ("a cat", "ohwx, a cat"),
        ("a cat by OHWX", "a cat by OHWX"),
        ("a photo of [trigger] with [trigger]'s cat", "a photo of ohwx with ohwx's cat"),
        ("ohwxes", "ohwx, ohwxes"),
    ]:
        assert caption_of(text, plain, visit=0, step=0, epoch=1) == caption
    assert caption_of("a cat", SubsetSettings(), visit=0, step=0, epoch=1) == "a cat"
    assert caption_of("[trigger]", SubsetSettings(), visit=0, step=0, epoch=1) == "[trigger]"


def test_a_dropped_caption_has_no_trigger_word():
    options = SubsetSettings(trigger_word="ohwx", caption_dropout_rate=1.0)
    assert caption_of("a cat", options, visit=0, step=0, epoch=1) == ""


def test_braces_in_a_trigger_word_are_no_wildcard():
    options = SubsetSettings(trigger_word="{o|x}", enable_wildcard=True)
    captions = {caption_of("{a|b} [trigger]", options, visit=n, step=0, epoch=1) for n in range(20)}
    assert captions == {"a {o|x}", "b {o|x}"}
