"""What a lint looks at: options, model files by their headers, data, forecast."""

from __future__ import annotations

from dataclasses import dataclass

from library.config.rule_context import Context
from library.preflight.facts import Forecast
from library.train.prepare import Data, ModelFiles


@dataclass(frozen=True, slots=True)
class Evidence:
    """All that is known before a model is loaded. `context` takes what there is to say."""

    context: Context
    files: ModelFiles
    data: Data
    forecast: Forecast
    captions: tuple[str, ...]  # of the training records, as their first visits have them
