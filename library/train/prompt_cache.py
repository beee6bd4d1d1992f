"""Text encoder outputs of sample prompts, kept beside the prompt file: a later run loads no encoder for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.cache.text import TextNeed, TextOptions, compacted, still_valid, write_file
from library.config.prompts import prompt_file
from library.config.train_config import TrainConfig
from library.data.readers import CachedText
from library.data.records import TextCond

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class PromptCache:
    """`prompts_flux_te.npz` beside `prompts.txt`; `base` None: nothing is kept on disk."""

    base: Path | None
    options: TextOptions

    @classmethod
    def of(cls, config: TrainConfig, options: TextOptions) -> PromptCache:
        """The cache of a run: on disk where captions are, too, and the prompts are in a file."""
        source = config.sampling.sample_prompts
        file = prompt_file(source) if source and config.caching.cache_text_encoder_outputs_to_disk else None
        return cls(file.with_suffix("") if file else None, options)

    def read(self, texts: Sequence[str]) -> dict[str, TextCond]:
        """Conditions of those `texts` that are there and were made with the same encoders and options."""
        if self.base is None or not texts:
            return {}
        held = still_valid(self._need(texts), options=self.options)
        return {text: _as_batch(compacted(output)) for text, output in held.items()}

    def write(self, conditions: Mapping[str, TextCond]) -> None:
        """Keep `conditions` in place of what is there. That they cannot be kept is no error."""
        if self.base is None:
            return
        need = self._need(tuple(conditions))
        outputs = [
            CachedText(one.clip_pooled[0], one.t5_hidden[0], one.t5_mask[0]) for one in conditions.values()
        ]
        try:
            write_file(need, outputs, options=self.options)
        except OSError as error:
            logger.info("%s cannot be written (%s); the next run encodes its prompts again", need.path, error)

    def _need(self, texts: Sequence[str]) -> TextNeed:
        return TextNeed(str(self.base), tuple(texts))


def _as_batch(text: CachedText) -> TextCond:
    return TextCond(text.clip_pooled[None], text.t5_hidden[None], text.t5_mask[None])
