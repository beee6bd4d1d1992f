"""Advice on captions: all alike, empty, longer than T5 takes."""

from __future__ import annotations

import os

from library.config.dataset_settings import SubsetSettings
from library.models.tokenizers import T5_LENGTH, FluxTokenizers
from library.preflight.evidence import Evidence
from library.preflight.words import count_text, names_text, short_text


def captions_say_something(evidence: Evidence) -> None:
    """One text for every picture, or none at all. That a folder has no caption files is said where they are read."""
    data = evidence.data.training
    for folder, subset in zip(evidence.forecast.folders, _subsets(evidence), strict=True):
        if folder.kind != "training" or folder.images < 2 or subset.caption_dropout_rate == 1:
            continue
        if folder.captions == 1 and folder.example not in ("", subset.class_tokens):
            evidence.context.advise(
                "captions-identical",
                f'{folder.name}: all {folder.images} images have the caption "{short_text(folder.example)}"; '
                "recommended: describe what is particular to each",
            )
    empty = [
        os.path.basename(record.file)
        for record, caption in zip(data.records, evidence.captions, strict=True)
        if not caption and data.subset(record).caption_dropout_rate < 1
    ]
    if empty:
        evidence.context.advise(
            "captions-empty",
            f"{count_text(len(empty), 'image trains', 'images train')} without words ({names_text(empty)}), which "
            "changes what every prompt draws; recommended: write captions",
        )


def captions_fit_t5(evidence: Evidence) -> None:
    """What T5 does not take is cut off. Tokenizers are read only if a caption could be too long, and only locally."""
    config, files, data = evidence.context.config, evidence.files, evidence.data.training
    length = config.model.t5xxl_max_token_length or T5_LENGTH["dev" if files.is_dev else "schnell"]
    captions = dict(zip(evidence.captions, data.records, strict=True))
    # No tokenizer makes more tokens than there are bytes, but for a mark at each end.
    long = [caption for caption in captions if len(caption.encode()) + 2 > length]
    tokenizers = FluxTokenizers.load_local(files.tokenizers, t5_length=length) if long else None
    if tokenizers is None:
        return
    lengths = {c: t5 for c, (_, t5) in zip(long, tokenizers.lengths(long), strict=True) if t5 > length}
    if lengths:
        names = [captions[caption].path.name for caption in lengths]
        evidence.context.advise(
            "captions-cut",
            f"{count_text(len(lengths), 'caption has', 'captions have')} more than {length} T5 tokens, up to "
            f"{max(lengths.values())}, the end is cut off ({names_text(names)}); recommended: shorten them, or raise "
            "t5xxl_max_token_length",
        )


def _subsets(evidence: Evidence) -> list[SubsetSettings]:
    """The settings of each reported folder, in the same order."""
    return [evidence.data.datasets[r.dataset].subsets[r.subset] for r in evidence.data.discovered.subsets]


CAPTION_LINTS = (captions_say_something, captions_fit_t5)
