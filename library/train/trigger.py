"""The trigger word beyond the captions: in sample prompts, in metadata, and whether it is a good one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from library.config.dataset_settings import DatasetSettings
from library.config.prompts import SamplePrompt
from library.data.captions import PLACEHOLDER
from library.models.tokenizers import FluxTokenizers, Pieces

MOST_CLIP, MOST_T5 = 6, 8  # pieces of one word that still pass without a warning
SPELT = 2  # fewer letters than this in a piece, on average, mean that T5 spells the word


def trigger_words(datasets: Sequence[DatasetSettings]) -> tuple[str, ...]:
    """The trigger words of all subsets, each once."""
    words = [subset.trigger_word for dataset in datasets for subset in dataset.subsets]
    return tuple(dict.fromkeys(word for word in words if word))


def fill_prompts(
    prompts: Sequence[SamplePrompt], words: Sequence[str]
) -> tuple[tuple[SamplePrompt, ...], tuple[str, ...]]:
    """Prompts with the one trigger word in place of `[trigger]`, and why it was left if it was."""
    asked = any(PLACEHOLDER in prompt.prompt + prompt.negative_prompt for prompt in prompts)
    if not asked:
        return tuple(prompts), ()
    if len(words) != 1:
        have = f"there are several: {', '.join(words)}" if words else "there is no trigger_word"
        return tuple(prompts), (f"{PLACEHOLDER} in sample_prompts is left as it is, since {have}",)
    filled = (
        replace(
            prompt,
            prompt=prompt.prompt.replace(PLACEHOLDER, words[0]),
            negative_prompt=prompt.negative_prompt.replace(PLACEHOLDER, words[0]),
        )
        for prompt in prompts
    )
    return tuple(filled), ()


def doubts(words: Sequence[str], tokenizers: FluxTokenizers) -> list[str]:
    """What speaks against each trigger word: the models know it already, or it falls into many tokens."""
    return [doubt for word in words if (doubt := _doubt(word, [tokenizers.pieces(w) for w in word.split()]))]


def _doubt(word: str, parts: Sequence[Pieces]) -> str | None:
    if any(part.unknown for part in parts):
        return f"trigger_word {word!r} has a character that T5 does not know: take letters"
    if any(len(part.clip) > MOST_CLIP or len(part.t5) > MOST_T5 for part in parts):
        clip, t5 = (sum(len(getattr(part, name)) for part in parts) for name in ("clip", "t5"))
        return (
            f"trigger_word {word!r} falls into {clip} tokens for CLIP-L and {t5} for T5: a shorter one is learnt "
            "more easily (each digit and underscore is a token)"
        )
    if all(_is_known(part) for part in parts):
        return (
            f"trigger_word {word!r} is a word that the text encoders know, so the adapter will also change what "
            "it means now: take one that means nothing yet"
        )
    return None


def _is_known(part: Pieces) -> bool:
    """One token for CLIP-L, and more than single letters for T5: made-up words such as "ohwx" fail the second."""
    return len(part.clip) == 1 and sum(map(len, part.t5)) >= SPELT * len(part.t5)
