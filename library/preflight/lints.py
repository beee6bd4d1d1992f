"""Advice that needs data or model files: every lint, and how they are run."""

from __future__ import annotations

from library.config.loaded import LoadedConfig
from library.config.notices import Notices
from library.config.rule_context import Context
from library.data.inspection import first_caption
from library.preflight.caption_lints import CAPTION_LINTS
from library.preflight.evidence import Evidence
from library.preflight.facts import Forecast
from library.preflight.model_lints import MODEL_LINTS
from library.preflight.picture_lints import PICTURE_LINTS
from library.preflight.run_lints import RUN_LINTS
from library.train.prepare import Data, ModelFiles


def advice(loaded: LoadedConfig, files: ModelFiles, data: Data, forecast: Forecast) -> tuple[str, ...]:
    """All advice on this run beyond what the options alone gave, less what ignore_advice names."""
    notices = Notices(ignored=loaded.config.run.ignored_codes)
    captions = tuple(first_caption(data.training, record) for record in data.training.records)
    evidence = Evidence(Context(loaded.config, loaded.sources, notices), files, data, forecast, captions)
    for lint in (*MODEL_LINTS, *PICTURE_LINTS, *CAPTION_LINTS, *RUN_LINTS):
        lint(evidence)
    return notices.all()
