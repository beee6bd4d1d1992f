"""From the caption in a file to the caption of one visit: Kohya's processing, as functions of text and a
generator.

The order of the decisions and what each option touches are Kohya's; the draws come from a generator of this
visit alone, so they depend on no other sample. `dropped` makes the first draw, so that a caption whose
encoding is cached is dropped exactly when a live one would be. Nothing here reads files or tokenizes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from library.config.dataset_settings import SubsetSettings

_CHOICE = re.compile(r"\{([^}]+)\}")
_OPEN, _CLOSE = "\ue000", "\ue001"  # private-use characters that stand for doubled braces meanwhile
JOINER = ", "  # Kohya joins tags with it whatever the separator is


@dataclass(frozen=True, slots=True)
class Tags:
    """A caption in three parts, of which only the middle is shuffled, dropped or warmed up."""

    fixed: list[str]
    flexible: list[str]
    suffix: list[str]


def dropped(settings: SubsetSettings, generator: np.random.Generator, *, epoch: int) -> bool:
    """Whether this visit trains without a caption. `epoch` counts from 1. Draws once if a rate is set, else
    never.
    """
    if settings.caption_dropout_rate > 0 and generator.random() < settings.caption_dropout_rate:
        return True
    every = settings.caption_dropout_every_n_epochs
    return every > 0 and epoch % every == 0


def may_drop(settings: SubsetSettings) -> bool:
    """Whether any visit of this subset can lose its caption."""
    return settings.caption_dropout_rate > 0 or settings.caption_dropout_every_n_epochs > 0


def process_caption(
    caption: str,
    settings: SubsetSettings,
    generator: np.random.Generator,
    *,
    step: int,
    max_train_steps: int,
    epoch: int,
) -> str:
    """The caption of one visit. `step` counts optimizer steps from 0, `epoch` from 1; a dropped caption is
    "".
    """
    if dropped(settings, generator, epoch=epoch):
        return ""
    text = _choose(_with_affixes(caption, settings), settings, generator.integers)
    if settings.shuffle_caption or settings.token_warmup_step > 0 or settings.caption_tag_dropout_rate > 0:
        tags = split_tags(text, settings)
        flexible = tags.flexible[: _warmed_up(len(tags.flexible), settings, step, max_train_steps)]
        if settings.shuffle_caption:
            flexible = [flexible[i] for i in generator.permutation(len(flexible))]
        rate = settings.caption_tag_dropout_rate
        if rate > 0:
            flexible = [tag for tag in flexible if generator.random() >= rate]
        text = JOINER.join([*tags.fixed, *flexible, *tags.suffix])
    return _with_main_separator(text, settings)


def fixed_caption(caption: str, settings: SubsetSettings, generator: np.random.Generator) -> str:
    """The caption that is encoded once and kept: affixes, separators and one choice of wildcards, nothing
    that changes by visit.
    """
    return _with_main_separator(
        _choose(_with_affixes(caption, settings), settings, generator.integers), settings
    )


def split_tags(text: str, settings: SubsetSettings) -> Tags:
    """Cut a caption at `keep_tokens_separator` if it has one, else after `keep_tokens` tags."""
    separator, mark = settings.caption_separator, settings.keep_tokens_separator
    if mark and mark in text:
        parts = text.split(mark, 2)
        pieces = [[tag for tag in _split(part, separator) if tag] for part in parts]
        return Tags(pieces[0], pieces[1], pieces[2] if len(pieces) > 2 else [])
    tags = _split(text.strip(), separator)
    return Tags(tags[: settings.keep_tokens], tags[settings.keep_tokens :], [])


def _split(text: str, separator: str) -> list[str]:
    return [tag.strip() for tag in text.split(separator)]


def _with_affixes(caption: str, settings: SubsetSettings) -> str:
    if settings.caption_prefix:
        caption = f"{settings.caption_prefix} {caption}"
    if settings.caption_suffix:
        caption = f"{caption} {settings.caption_suffix}"
    return caption


def _choose(text: str, settings: SubsetSettings, pick: Callable[[int], np.int64]) -> str:
    """One line, with `{a|b}` decided when wildcards are on; the first line as it is otherwise."""
    if not settings.enable_wildcard:
        return text.split("\n", 1)[0]

    def one_of(options: Sequence[str]) -> str:
        return options[int(pick(len(options)))]

    if "\n" in text:
        text = one_of(text.split("\n"))
    text = text.replace("{{", _OPEN).replace("}}", _CLOSE)
    text = _CHOICE.sub(lambda match: one_of(match.group(1).split("|")), text)
    return text.replace(_OPEN, "{").replace(_CLOSE, "}")


def _with_main_separator(text: str, settings: SubsetSettings) -> str:
    if settings.secondary_separator:
        return text.replace(settings.secondary_separator, settings.caption_separator)
    return text


def _warmed_up(count: int, settings: SubsetSettings, step: int, max_train_steps: int) -> int:
    """How many flexible tags are in use at this step."""
    until = settings.token_warmup_step
    if until < 1:
        until = math.floor(until * max_train_steps)
    if until <= 0 or step >= until:
        return count
    return math.floor(step * ((count - settings.token_warmup_min) / until)) + settings.token_warmup_min
