"""Facts in words, as (name, text): shared by the tables of a dry run and the lines at the start of a run."""

from __future__ import annotations

from library.cache.survey import LATENTS, TEXTS
from library.preflight.facts import CacheFacts, Forecast
from library.preflight.words import count_text, size_text, steps_text


def plan_rows(facts: Forecast) -> list[tuple[str, str]]:
    """The plan in words."""
    plan = facts.plan
    used = f"{plan.images} used" + (f", {plan.left_out} left out" if plan.left_out else "")
    repeats = f"{plan.samples_per_epoch} an epoch with repeats"
    sizes = "/".join(map(str, plan.batch_sizes))
    start = [("starts after step", str(plan.first_step))] if plan.first_step else []
    return [
        ("images", f"{used}, {repeats}"),
        ("regularisation images", str(plan.regularisation_images)),
        ("validation images", str(plan.validation_images)),
        ("batches", f"{plan.batches_per_epoch} of up to {sizes} an epoch"),
        (
            "batches a step",
            f"{plan.batches_per_step} ({count_text(plan.gpus, 'GPU')} or process x accumulation)",
        ),
        ("steps per epoch", str(plan.steps_per_epoch)),
        ("epochs", str(plan.epochs)),
        *start,
        ("total steps", str(plan.total_steps)),
        ("visits of an image", f"{plan.visits_per_image:.4g}"),
    ]


def cache_rows(facts: Forecast) -> list[tuple[str, str]]:
    """What is there, and what will be made."""
    found = {cache.what: cache for cache in facts.caches}
    return [(what, _cache_text(found.get(what))) for what in (LATENTS, TEXTS)]


def _cache_text(cache: CacheFacts | None) -> str:
    if cache is None:
        return "not cached: made in every step"
    there = f"{cache.entries - cache.to_encode} of {cache.entries} there, {cache.to_encode} to encode"
    written = f", {size_text(cache.bytes_to_write)} to write" if cache.bytes_to_write else ""
    kept = f", {size_text(cache.bytes_in_memory)} kept in memory" if cache.bytes_in_memory else ""
    return there + written + kept


def schedule_rows(facts: Forecast) -> list[tuple[str, str]]:
    """When samples are drawn and when is validated."""
    schedule, rows = facts.schedule, []
    if schedule.sample_steps:
        rows.append(
            (
                "samples",
                f"{count_text(schedule.prompts, 'prompt')} at step {steps_text(schedule.sample_steps)}",
            )
        )
    else:
        rows.append(("samples", "none"))
    if schedule.validation_steps:
        batches = count_text(schedule.validation_batches, "batch", "batches")
        rows.append(("validation", f"{batches} at step {steps_text(schedule.validation_steps)}"))
    else:
        rows.append(("validation", "none"))
    if schedule.log_folder is not None:
        rows.append(("TensorBoard logs", f"{schedule.log_folder}, every step"))
    return rows
