"""Advice on the length of the run, its schedules, and what it finds in output_dir."""

from __future__ import annotations

import json
from pathlib import Path

from library.preflight.evidence import Evidence
from library.preflight.words import count_text, names_text, size_text
from library.train.checkpoint import MANIFEST, STATE_SUFFIX, TRAIN_STATE

USUAL_VISITS = (25, 250)  # of each image over the run
FEW_IMAGES = 100  # above it, styles are learnt with fewer visits of each


def images_are_seen_often_enough(evidence: Evidence) -> None:
    """Recipes ask for 40 to 100 steps an image."""
    plan = evidence.forecast.plan
    visits = plan.visits_per_image
    seen = f"each image is seen {visits:.3g} times in {plan.total_steps} steps"
    if visits < USUAL_VISITS[0] and plan.images <= FEW_IMAGES:
        evidence.context.advise("steps-few", f"{seen}: likely undertrained; recommended: 40 to 100 times")
    elif visits > USUAL_VISITS[1]:
        evidence.context.advise("steps-many", f"{seen}: likely overtrained; recommended: 40 to 100 times")


def intervals_fit_the_run(evidence: Evidence) -> None:
    """An interval longer than the run never comes round."""
    context, plan = evidence.context, evidence.forecast.plan
    for code, options in INTERVALS:
        for option in options:
            every = context.config.value(option)
            length = plan.total_steps if option.endswith("steps") else plan.epochs
            unit = "step" if option.endswith("steps") else "epoch"
            if isinstance(every, int) and every > length:
                context.advise(
                    code,
                    f"{context.said(option)}: the run has only {count_text(length, unit)}, so it never comes round",
                )


def validation_means_something(evidence: Evidence) -> None:
    """One picture is no measure of a set, and none is no validation."""
    held = evidence.forecast.plan.validation_images
    splits = (subset.validation_split for dataset in evidence.data.datasets for subset in dataset.subsets)
    if held == 0 and any(split > 0 for split in splits):
        evidence.context.advise(
            "validation-empty",
            "validation_split is too small a share of any folder to hold back one image, so nothing is validated; "
            "recommended: a larger validation_split, or none",
        )
    elif held == 1:
        evidence.context.advise(
            "validation-small",
            "validation_split holds back one image, and the validation loss says how that one fares; recommended: at "
            "least 4, or none",
        )


def prior_loss_has_images(evidence: Evidence) -> None:
    """prior_loss_weight weighs regularisation images."""
    context = evidence.context
    if context.given("prior_loss_weight") and not evidence.forecast.plan.regularisation_images:
        context.advise(
            "prior-loss-weight-unused",
            f"{context.said('prior_loss_weight')} has no effect, as there is no regularisation image: give "
            "reg_data_dir, or remove it",
        )


def nothing_is_lost(evidence: Evidence) -> None:
    """Files of the same names are replaced."""
    there = [file.path.name for file in evidence.forecast.files if file.exists]
    if there and evidence.context.config.saving.resume is None:
        evidence.context.advise(
            "files-replaced",
            f"{evidence.context.config.saving.output_dir} holds {count_text(len(there), 'file')} that the run will "
            f"replace ({names_text(there)}); recommended: another output_name",
        )


def resume_is_known(evidence: Evidence) -> None:
    """A state of this output that is further on than the start of this run."""
    saving = evidence.context.config.saving
    if saving.resume is not None or saving.output_dir is None or not saving.output_name:
        return
    states = [(_step(path), path) for path in saving.output_dir.glob(f"{saving.output_name}*{STATE_SUFFIX}")]
    step, newest = max(states, default=(-1, saving.output_dir))
    if evidence.forecast.plan.first_step < step < evidence.forecast.plan.total_steps:
        evidence.context.advise(
            "state-newer",
            f"{newest.name} in {saving.output_dir} has done {step} of {evidence.forecast.plan.total_steps} steps, and "
            "this run starts afresh; recommended: --resume auto goes on from there",
        )


def disks_have_room(evidence: Evidence) -> None:
    """A full disk ends a run in the middle."""
    for disk in evidence.forecast.disks:
        if disk.needed > disk.free:
            evidence.context.advise(
                "disk-space",
                f"the run writes {size_text(disk.needed)} to the disk of {disk.folder}, which has "
                f"{size_text(disk.free)} free; recommended: free space, or keep fewer files",
            )


def _step(state: Path) -> int:
    """Steps that a whole state says it has done; -1 for what is none."""
    try:
        done = int(json.loads((state / TRAIN_STATE).read_text(encoding="utf-8"))["step"])
    except (OSError, ValueError, KeyError):
        return -1
    return done if (state / MANIFEST).is_file() else -1


INTERVALS = (
    ("save-never", ("save_every_n_epochs", "save_every_n_steps")),
    ("sample-never", ("sample_every_n_epochs", "sample_every_n_steps")),
    ("validation-never", ("validate_every_n_epochs", "validate_every_n_steps")),
)

RUN_LINTS = (
    images_are_seen_often_enough,
    intervals_fit_the_run,
    validation_means_something,
    prior_loss_has_images,
    nothing_is_lost,
    resume_is_known,
    disks_have_room,
)
