"""The lines before the first step: the forecast in short, in Kohya's order of things."""

from __future__ import annotations

import logging

from library.preflight.facts import Forecast
from library.preflight.rows import plan_rows, schedule_rows
from library.preflight.words import count_text, size_text

logger = logging.getLogger(__name__)

MOST_BUCKETS = 6


def say_start(facts: Forecast, *, device: str) -> None:
    """Say in about ten lines what is about to happen."""
    for line in start_lines(facts, device=device):
        logger.info(line)


def start_lines(facts: Forecast, *, device: str) -> list[str]:
    """One line for each thing that people look for in a log."""
    plan, trained = facts.plan, facts.trained
    rows = dict(plan_rows(facts)) | dict(schedule_rows(facts))
    layers = sum(count for _, count in trained.modules)
    sizes = "/".join(map(str, plan.batch_sizes))
    epochs = count_text(plan.epochs, "epoch")
    start = f", from step {plan.first_step}" if plan.first_step else ""
    said = [
        ("images", f"{rows['images']}; {plan.validation_images} for validation"),
        ("buckets", _buckets(facts)),
        ("plan", f"{epochs} of {count_text(plan.steps_per_epoch, 'step')}, {plan.total_steps} in all{start}"),
        ("visits", f"each image is seen {plan.visits_per_image:.4g} times"),
        ("a step", f"{plan.batches_per_step} x up to {sizes} images on {plan.gpus} x {device}"),
        ("trained", f"{trained.parameters:,} parameters in {layers} layers"),
        *(
            (f"  {group.name}", f"{group.parameters:,} at {group.learning_rate:g}")
            for group in trained.groups
        ),
        ("writes", _files(facts)),
        ("samples", rows["samples"]),
        ("validation", rows["validation"]),
    ]
    return [f"{name:<12} {text}" for name, text in said]


def _buckets(facts: Forecast) -> str:
    shown = [f"{b.size[0]}x{b.size[1]}: {b.samples}" for b in facts.buckets[:MOST_BUCKETS]]
    more = len(facts.buckets) - len(shown)
    return ", ".join(shown) + (f" and {more} more" if more else "") + " (with repeats)"


def _files(facts: Forecast) -> str:
    files = [file for file in facts.files if file.kind == "network"]
    states = sum(file.kind == "state" for file in facts.files)
    networks = f"{count_text(len(files), 'network file')} of {size_text(facts.trained.network_bytes)}"
    saved = f" and {count_text(states, 'state')} of {size_text(facts.trained.state_bytes)}" if states else ""
    return f"{networks}{saved} into {files[-1].path.parent}"
