"""A folder of a repository on the Hugging Face Hub: put files there, fetch a state from there.

Errors of the network come out as huggingface_hub raises them; what the user gave wrongly is a UserError.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from huggingface_hub.utils.tqdm import disable_progress_bars

from library.errors import CheckpointError, ConfigError

REPO_TYPES = ("model", "dataset", "space")
REFUSED = (401, 403)  # HTTP: the token is wrong, or not for this repository


@dataclass(frozen=True, slots=True, kw_only=True)
class HubFolder:
    """`path` inside a repository; "" is its root. `token` None is the one of `hf auth login` or HF_TOKEN."""

    repo_id: str
    repo_type: str = "model"
    path: str = ""
    private: bool = True
    token: str | None = None

    def check(self) -> None:
        """Say what is plainly wrong without asking the network. Raises ConfigError."""
        parts = self.repo_id.split("/")
        if len(parts) != 2 or not all(parts):
            raise ConfigError(
                f"huggingface_repo_id {self.repo_id!r} is no repository: write user/name, such as me/my-lora"
            )
        if self.token is None and get_token() is None:
            raise ConfigError(
                f"huggingface_repo_id {self.repo_id} needs a token that may write: "
                "run `hf auth login`, or set HF_TOKEN or huggingface_token"
            )

    def create(self) -> None:
        """Make the repository unless it is there. ConfigError when the Hub refuses the token."""
        try:
            self._api().create_repo(
                self.repo_id, repo_type=self.repo_type, private=self.private, exist_ok=True
            )
        except HfHubHTTPError as error:
            if status_of(error) in REFUSED:
                raise ConfigError(
                    f"the Hugging Face Hub refuses the token for {self.repo_id} (HTTP {status_of(error)}): "
                    "give one that may write there, or remove huggingface_repo_id"
                ) from None
            raise

    def put(self, local: Path) -> str:
        """Upload a file, or a folder with all its files, under its own name. Returns its path there."""
        disable_progress_bars()  # they would run through the bar of the training
        target, message = self._target(local.name), f"Add {local.name}"
        repo_id, repo_type = self.repo_id, self.repo_type
        if local.is_dir():
            self._api().upload_folder(
                folder_path=local, path_in_repo=target, repo_id=repo_id, repo_type=repo_type,
                commit_message=message,
            )  # fmt: skip
        else:
            self._api().upload_file(
                path_or_fileobj=local, path_in_repo=target, repo_id=repo_id, repo_type=repo_type,
                commit_message=message,
            )  # fmt: skip
        return target

    def put_card(self, card: Path, shown: Mapping[str, Path], *, mark: str) -> str:
        """Upload a model card as README.md with the pictures it shows, by their path beside it, in one commit.

        A README.md without `mark` is somebody's own: then the card keeps its name. Returns the card's path there.
        """
        disable_progress_bars()
        target = self._target("README.md" if self._may_replace("README.md", mark) else card.name)
        files = {target: card, **{self._target(name): path for name, path in shown.items()}}
        self._api().create_commit(
            self.repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=path) for name, path in files.items()],
            repo_type=self.repo_type,
            commit_message=f"Add {card.name} as {target}",
        )
        return target

    def _may_replace(self, name: str, mark: str) -> bool:
        """Whether a text file there is missing or holds `mark`."""
        try:
            there = self._api().hf_hub_download(self.repo_id, self._target(name), repo_type=self.repo_type)
        except LocalEntryNotFoundError:  # the Hub was not reached: a kind of the next one, but no answer
            raise
        except EntryNotFoundError:
            return True
        return mark in Path(there).read_text(encoding="utf-8", errors="replace")

    def _target(self, name: str) -> str:
        return str(PurePosixPath(self.path) / name)

    def _api(self) -> HfApi:
        return HfApi(token=self.token)


def fetch_folder(reference: str, *, token: str | None) -> Path:
    """Download the folder that `user/repo/path[:revision[:type]]` names. Returns where it lies on this machine.

    Raises CheckpointError, naming the reference, when there is none or it cannot be fetched.
    """
    name, _, rest = reference.partition(":")
    revision, _, kind = rest.partition(":")
    parts = PurePosixPath(name).parts
    if len(parts) < 3 or (kind or "model") not in REPO_TYPES:
        raise CheckpointError(
            f"--resume {reference}: with resume_from_huggingface it is user/repository/folder, which may be "
            f"followed by :revision and :type (one of {', '.join(REPO_TYPES)})"
        )
    repo_id, folder = "/".join(parts[:2]), "/".join(parts[2:])
    try:
        root = HfApi(token=token).snapshot_download(
            repo_id,
            repo_type=kind or "model",
            revision=revision or None,
            allow_patterns=f"{folder}/*",
        )
    except Exception as error:
        raise CheckpointError(
            f"--resume {reference}: {repo_id} cannot be read from the Hugging Face Hub ({first_line(error)})"
        ) from error
    found = Path(root) / folder
    if not found.is_dir():
        raise CheckpointError(f"--resume {reference}: {repo_id} has no folder {folder}")
    return found


def status_of(error: HfHubHTTPError) -> int | None:
    """The HTTP status behind an error, if there was an answer."""
    response = getattr(error, "response", None)
    return None if response is None else int(response.status_code)


def first_line(error: BaseException) -> str:
    """An error in a few words, for the middle of a sentence."""
    return str(error).strip().split("\n", 1)[0].rstrip(".") or type(error).__name__
