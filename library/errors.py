"""What can go wrong, as types. Raised where it is known, caught once, in `flux_train_network.py`.

A `UserError` is one clear sentence for the person at the screen (what, where, what to do) and exit code 2;
anything else that escapes is a bug of ours and shows its traceback.
"""

from __future__ import annotations


class TrainerError(Exception):
    """Base of every error that the trainer raises on purpose."""

    exit_code = 1
    together = False  # whether every rank raises it at the same step, so that one may speak for all


class UserError(TrainerError):
    """Something the user gave cannot be used; shown as one sentence, without a traceback."""

    exit_code = 2


class ConfigError(UserError):
    """An option or a config file: names the option, its value, where it came from and what is allowed."""


class DatasetError(UserError):
    """A folder, image, caption or metadata file: names the path and how many others share the trouble."""


class CheckpointError(UserError):
    """A model or adapter file that is missing, of another kind, or incomplete."""


class NetworkPluginError(UserError):
    """A network module that is missing, lacks a required function, or matches nothing."""


class EnvironmentUnsupported(UserError):
    """What the machine or an installed package lacks for what was asked."""


class TrainingDiverged(TrainerError):
    """A loss or gradient that is not finite: says step, values and the last good checkpoint."""

    exit_code = 3
    together = True


class NothingToDo(TrainerError):
    """The run that was to be resumed is complete: no error, so that a restarting launcher comes to rest."""

    exit_code = 0
    together = True


class Interrupted(TrainerError):
    """A signal asked the run to stop; its state was written first."""

    exit_code = 4
    together = True


class WriteFailed(TrainerError):
    """A file could not be written, as on a full disk; what was there before is as it was."""

    exit_code = 5


class OutOfMemory(TrainerError):
    """The memory of the GPU or of the machine ran out; says what takes less."""

    exit_code = 6


class RankFollowed(TrainerError):
    """Another rank stopped, so this one does: what it met itself was only the echo, and it has nothing to say."""


class RankLost(TrainerError):
    """Another rank is gone without a word, as one that was killed: all that this one sees is the broken connection."""
