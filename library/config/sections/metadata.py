"""[metadata] What is written into the header of adapter files."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.options import option


@dataclass(frozen=True, slots=True, kw_only=True)
class MetadataConfig:
    """Metadata of adapter files."""

    no_metadata: bool = option(False, "write no training metadata")
    training_comment: str | None = option(None, "a comment of one's own")
    metadata_title: str | None = option(None, "title; unset is output_name")
    metadata_author: str | None = option(None, "author")
    metadata_description: str | None = option(None, "description")
    metadata_license: str | None = option(None, "licence")
    metadata_tags: str | None = option(None, "tags, separated by commas")
    metadata_usage_hint: str | None = option(None, "how to use it")
    metadata_thumbnail: str | None = option(None, "thumbnail as a data URL")
    metadata_merged_from: str | None = option(None, "models it was merged from")
    metadata_trigger_phrase: str | None = option(None, "words that trigger it; unset is trigger_word")
    metadata_preprocessor: str | None = option(None, "preprocessing it needs")
    metadata_is_negative_embedding: str | None = option(None, "whether it is a negative embedding")
