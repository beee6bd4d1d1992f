"""From the caption in a file to the caption of one visit: Kohya's processing, as functions of text and a
generator.

The order of the decisions and what each option touches are Kohya's; the draws come from a generator of this
visit alone, so they depend on no other sample. `dropped` makes the first draw, so that a caption whose
encoding is cached is dropped exactly when a live one would be. `trigger_word`, which Kohya does not know, is
held in place: a caption that lacks it begins with it, and no tag that holds it is moved or dropped. Nothing
here reads files or tokenizes.
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
PLACEHOLDER = "[trigger]"  # stands for the trigger word in captions and sample prompts


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


def moves_tags(settings: SubsetSettings) -> bool:
    """Whether the tags of a caption may differ from visit to visit."""
    return settings.shuffle_caption or settings.token_warmup_step > 0 or settings.caption_tag_dropout_rate > 0


def varies(settings: SubsetSettings) -> bool:
    """Whether two visits of an image may have different captions, dropped ones aside."""
    return settings.enable_wildcard or moves_tags(settings)


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
    return _vary(caption, settings, generator, step=step, max_train_steps=max_train_steps)


def undropped_caption(
    caption: str, settings: SubsetSettings, generator: np.random.Generator, *, step: int, max_train_steps: int
) -> str:
    """What `process_caption` gives with the same generator if the caption is not dropped."""
    dropped(settings, generator, epoch=1)  # makes its draw: those that follow are the same
    return _vary(caption, settings, generator, step=step, max_train_steps=max_train_steps)


def _vary(
    caption: str, settings: SubsetSettings, generator: np.random.Generator, *, step: int, max_train_steps: int
) -> str:
    text = _choose(_with_affixes(caption, settings), settings, generator.integers)
    trigger = settings.trigger_word or ""
    if trigger:
        text = text.replace(PLACEHOLDER, trigger)
    lead = "" if holds(text, trigger) else trigger
    if settings.rejoin_tags or moves_tags(settings):  # else the text is left as it is, marks and all
        tags = split_tags(text, settings)
        in_use = _warmed_up(len(tags.flexible), settings, step, max_train_steps)
        flexible = _vary_tags(tags.flexible, in_use, settings, generator)
        text = JOINER.join([*tags.fixed, *flexible, *tags.suffix])
    return JOINER.join(part for part in (lead, _with_main_separator(text, settings)) if part)


def holds(text: str, trigger: str) -> bool:
    """Whether `text` has the trigger as a word of its own, in capitals or not. Every text has the empty one."""
    if trigger.lower() not in text.lower():
        return False
    return not trigger or re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE) is not None


def _vary_tags(
    flexible: list[str], in_use: int, settings: SubsetSettings, generator: np.random.Generator
) -> list[str]:
    """The first `in_use` tags, shuffled and thinned out; tags with the trigger word stay where they are."""
    trigger, rate = settings.trigger_word, settings.caption_tag_dropout_rate
    held = {tag for tag in flexible if holds(tag, trigger)} if trigger else set[str]()
    tags = [tag for number, tag in enumerate(flexible) if number < in_use or tag in held]
    if settings.shuffle_caption:
        free = [number for number, tag in enumerate(tags) if tag not in held]
        moved = [tags[free[number]] for number in generator.permutation(len(free))]
        for number, tag in zip(free, moved, strict=True):
            tags[number] = tag
    return [tag for tag in tags if tag in held or rate <= 0 or generator.random() >= rate]


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


def warmup_end(settings: SubsetSettings, max_train_steps: int) -> float:
    """The step from which on all tags are in use; 0 without token warm-up."""
    until = settings.token_warmup_step
    return math.floor(until * max_train_steps) if until < 1 else until


def _warmed_up(count: int, settings: SubsetSettings, step: int, max_train_steps: int) -> int:
    """How many flexible tags are in use at this step."""
    until = warmup_end(settings, max_train_steps)
    if until <= 0 or step >= until:
        return count
    return math.floor(step * ((count - settings.token_warmup_min) / until)) + settings.token_warmup_min
