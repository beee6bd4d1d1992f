"""What is done without a model: the checks before all else, the dry run, the contact sheets of a dataset."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable

from rich.console import Console

from library.config.loaded import LoadedConfig
from library.config.notices import refuse
from library.config.prompts import SamplePrompt
from library.config.train_config import TrainConfig
from library.distributed.launch import expected_world_size, launched_rank
from library.log import quiet
from library.models.tokenizers import FluxTokenizers
from library.preflight.caches import caches
from library.preflight.forecast import forecast
from library.preflight.lints import advice
from library.preflight.report import Report, write_report
from library.preflight.tables import print_report
from library.train import graphs
from library.train.build import (
    check_parts,
    check_schedule,
    wanted_prompts,
)
from library.train.contact_sheets import FOLDER, show_dataset
from library.train.loading import ModelLoader
from library.train.prepare import (
    Data,
    ModelFiles,
    check_swap,
    locate_models,
    no_garbage_collection,
    read_data,
    start_step,
)
from library.train.resume import (
    continued_state,
    resumed_run,
)
from library.train.trackers import check as check_trackers
from library.train.trigger import doubts, fill_prompts, trigger_words
from library.train.upload import check_hub

logger = logging.getLogger(__name__)


def dry_run(loaded: LoadedConfig) -> None:
    """Check config and data and tell what the run would do; no model is loaded."""
    if launched_rank() != 0:
        return
    with no_garbage_collection():
        _dry_run(loaded)


def _dry_run(loaded: LoadedConfig) -> None:
    config = loaded.config
    files, said = check_early(config)
    written = wanted_prompts(config)
    notices = [*loaded.notices, *said, *written.notices]
    loader = ModelLoader(config, files)
    saved = resumed_run(config)
    given, world_size = config.training.seed, expected_world_size(config.distributed)
    seed = given if given is not None else saved.state.seed if saved else 0
    data = read_data(config, seed=seed, world_size=world_size)
    notices += check_schedule(config, data.plan.total_steps)
    start = (
        continued_state(config, data.plan, saved, seed=seed).step if saved else start_step(config, data.plan)
    )
    prompts, doubtful = with_trigger(written.prompts, data, loader.local_tokenizers)
    found = caches(config, loader, data)
    with quiet(logging.INFO):
        expected = forecast(
            config, files, data, prompts=prompts, caches=found, world_size=world_size, first_step=start
        )  # fmt: skip
    of_caches = (notice for cache in found for notice in cache.notices)
    notices += [*data.notices, *doubtful, *of_caches, *advice(loaded, files, data, expected)]
    report = Report(loaded, expected, tuple(notices))
    if config.run.dry_run_json is not None:
        write_report(report, config.run.dry_run_json)
    if config.run.dry_run_json != "-":
        print_report(report)
    if config.run.strict_config:
        refuse(notices)


def check_early(config: TrainConfig) -> tuple[ModelFiles, tuple[str, ...]]:
    """Find the model files, and whatever is wrong with parts that need neither data nor a model to be looked at.

    Returns also what there is to say, which a run says as it builds the parts.
    """
    files = locate_models(config.model)
    check_swap(config.memory, files)
    graphs.check(config)
    check_trackers(config.logging)
    check_hub(config.saving)
    return files, check_parts(config)


def debug_dataset(config: TrainConfig) -> None:
    """Show what the first epoch trains on; no model is loaded."""
    data = read_data(
        config, seed=config.training.seed or 0, world_size=expected_world_size(config.distributed)
    )
    say(data.notices)
    if launched_rank() == 0:
        assert config.saving.output_dir is not None, "checked by the config rules"
        show_dataset(data, config.caching, config.saving.output_dir / FOLDER, Console())


def with_trigger(
    prompts: tuple[SamplePrompt, ...], data: Data, tokenizers: Callable[[], FluxTokenizers | None]
) -> tuple[tuple[SamplePrompt, ...], tuple[str, ...]]:
    """The prompts with the trigger word in its place, and what is doubtful about it."""
    words = trigger_words(data.datasets)
    filled, notices = fill_prompts(prompts, words)
    if words and (found := tokenizers()) is not None:
        notices = (*notices, *doubts(words, found))
    return filled, notices


def say(notices: Iterable[str]) -> None:
    """Show sentences about a config or dataset that can be used all the same."""
    for notice in notices:
        logger.warning(notice)
