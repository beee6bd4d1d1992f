"""Checks of the options for trackers and for the Hugging Face Hub. Nothing is imported and nobody is asked here."""

from __future__ import annotations

from pathlib import Path

from library.config.options import COMMAND_LINE, SECRETS
from library.config.rule_context import Context
from library.errors import ConfigError

AUTO = Path("auto")  # as `resume`: the newest state in output_dir


def trackers_are_asked_for(context: Context) -> None:
    """Options of a tracker do nothing where log_with leaves it out."""
    logging = context.config.logging
    wandb = logging.log_with in ("wandb", "all")
    idle = [name for name in ("wandb_run_name", "wandb_api_key") if not wandb and context.given(name)]
    if logging.log_with is None and logging.logging_dir is None:
        names = ("log_tracker_name", "log_prefix", "log_tracker_config", "log_config")
        idle += [name for name in names if context.given(name)]
    if idle:
        wanted = 'log_with = "wandb"' if idle[-1].startswith("wandb") else "log_with or logging_dir"
        context.notices.remarks.append(f"without {wanted} no effect: {', '.join(idle)}")


def secrets_stay_secret(context: Context) -> None:
    """A command line is seen by every user of the machine."""
    for name in sorted(SECRETS):
        if context.sources.get(name) == COMMAND_LINE:
            safer = {"wandb_api_key": "WANDB_API_KEY", "huggingface_token": "HF_TOKEN"}[name]
            context.advise(
                "secrets-on-command-line",
                f"--{name} on the command line can be read by others on this machine; "
                f"the environment variable {safer} cannot",
            )


def hub_options_fit(context: Context) -> None:
    """Uploading needs a repository, fetching the name of a state."""
    saving = context.config.saving
    if saving.resume_from_huggingface and saving.resume in (None, AUTO):
        raise ConfigError(
            f"{context.said('resume_from_huggingface')} needs resume: name the uploaded state, "
            "user/repository/folder"
        )
    allowed = {
        "huggingface_repo_type": ("model", "dataset", "space"),
        "huggingface_repo_visibility": ("public", "private"),
    }
    for name, values in allowed.items():
        if context.config.value(name) not in (None, *values):
            raise ConfigError(f"{context.said(name)} is not one of {', '.join(values)}")
    names = (*allowed, "huggingface_path_in_repo", "save_state_to_huggingface", "async_upload")
    idle = [name for name in names if context.given(name)]
    if saving.huggingface_repo_id is None and idle:
        context.notices.remarks.append(
            f"without huggingface_repo_id nothing is uploaded, so ignored: {', '.join(idle)}"
        )


SERVICE_RULES = (trackers_are_asked_for, secrets_stay_secret, hub_options_fit)
