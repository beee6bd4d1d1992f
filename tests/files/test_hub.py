"""Uploads to and states from the Hugging Face Hub: the real client against a small hub on this machine."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from library.errors import CheckpointError, ConfigError
from library.files.hub import HubFolder, fetch_folder
from library.train.upload import Uploader
from tests.files.hub_server import TOKEN, Hub, point_client_at, running_hub

REPO = "me/lora"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    with running_hub() as server:
        point_client_at(server, monkeypatch, tmp_path)
        yield server


@pytest.fixture
def folder(hub: Hub) -> HubFolder:
    made = HubFolder(repo_id=REPO, path="runs/one", token=TOKEN)
    made.create()
    return made


@pytest.fixture
def state(tmp_path: Path) -> Path:
    path = tmp_path / "out-000002-state"
    path.mkdir()
    (path / "model.safetensors").write_bytes(os.urandom(9000))
    (path / "train_state.json").write_text('{"step": 2}')
    return path


def test_a_repository_is_made_once_and_private(hub: Hub, folder: HubFolder):
    folder.create()
    assert hub.repos[REPO].get("private") is True or hub.repos[REPO].get("visibility") == "private"
    HubFolder(repo_id="me/open", private=False, token=TOKEN).create()
    assert hub.repos["me/open"].get("private") is not True
    assert hub.repos["me/open"].get("visibility") != "private"


def test_files_and_states_go_up_and_come_back(hub: Hub, folder: HubFolder, state: Path):
    assert folder.put(state) == "runs/one/out-000002-state"
    assert folder.put(state / "model.safetensors") == "runs/one/model.safetensors"
    assert HubFolder(repo_id=REPO, token=TOKEN).put(state / "train_state.json") == "train_state.json"
    assert sorted(hub.files) == [
        "me/lora/runs/one/model.safetensors",
        "me/lora/runs/one/out-000002-state/model.safetensors",
        "me/lora/runs/one/out-000002-state/train_state.json",
        "me/lora/train_state.json",
    ]
    fetched = fetch_folder("me/lora/runs/one/out-000002-state:main:model", token=TOKEN)
    assert {path.name: path.read_bytes() for path in fetched.iterdir()} == {
        path.name: path.read_bytes() for path in state.iterdir()
    }


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("me/lora", "user/repository/folder"),
        ("me/lora/x:main:film", "one of model, dataset, space"),
        ("me/lora/nothing-state", "has no folder nothing-state"),
        ("me/nowhere/x", "me/nowhere cannot be read"),
    ],
)
def test_what_cannot_be_fetched_is_one_sentence(hub: Hub, folder: HubFolder, reference: str, said: str):
    with pytest.raises(CheckpointError) as caught:
        fetch_folder(reference, token=TOKEN)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_card_becomes_the_page_of_the_repository_with_its_pictures(
    hub: Hub, folder: HubFolder, tmp_path: Path
):
    card, picture = tmp_path / "cat.md", tmp_path / "sample" / "cat_1.png"
    picture.parent.mkdir()
    picture.write_bytes(b"png")
    for text in ("first, ours", "second, ours"):
        card.write_text(text)
        assert folder.put_card(card, {"sample/cat_1.png": picture}, mark="ours") == "runs/one/README.md"
        assert hub.files["me/lora/runs/one/README.md"] == text.encode()
    assert hub.files["me/lora/runs/one/sample/cat_1.png"] == b"png"
    hub.files["me/lora/README.md"] = b"somebody's own"
    assert HubFolder(repo_id=REPO, token=TOKEN).put_card(card, {}, mark="ours") == "cat.md"
    assert hub.files["me/lora/README.md"] == b"somebody's own"


def test_a_missing_or_refused_token_is_said_at_the_start(hub: Hub):
    with pytest.raises(ConfigError, match="hf auth login"):
        HubFolder(repo_id=REPO).check()
    with pytest.raises(ConfigError, match="write user/name"):
        HubFolder(repo_id="lora", token=TOKEN).check()
    wrong = HubFolder(repo_id=REPO, token="hf_wrong")
    wrong.check()
    with pytest.raises(ConfigError, match=r"refuses the token for me/lora \(HTTP 401\)") as caught:
        wrong.create()
    assert "hf_wrong" not in str(caught.value)


def test_a_failed_upload_is_one_warning(hub: Hub, folder: HubFolder, state: Path, our_warnings: list[str]):
    hub.down = True
    Uploader(folder, background=False).put(state / "train_state.json")
    (said,) = our_warnings
    assert "train_state.json could not be uploaded to me/lora" in said
    assert TOKEN not in said
    assert (state / "train_state.json").is_file()


def test_uploads_in_the_background_hold_nothing_up_and_are_awaited(
    hub: Hub, folder: HubFolder, state: Path, our_warnings: list[str]
):
    hub.gate.clear()
    uploader = Uploader(folder, background=True)
    uploader.put(state)
    assert not hub.files
    start = time.perf_counter()
    uploader.finish(patience=0.2)
    assert time.perf_counter() - start < 5
    assert our_warnings == ["not uploaded within 0 s: out-000002-state"]
    hub.gate.set()
    uploader.wait_for(state)  # as before it is removed
    assert len(hub.files) == 2
    uploader.put(state / "train_state.json", now=True)
    uploader.finish()
    assert "me/lora/runs/one/train_state.json" in hub.files
