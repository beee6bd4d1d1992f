"""Tokenizers from folders of every layout, padding and cutting, and the sentence without a network."""

from __future__ import annotations

import shutil

import huggingface_hub.constants
import pytest
import torch

from library.errors import CheckpointError
from library.models.tiny_tokenizers import (
    CLIP_FOLDER,
    T5_FOLDER,
    clip_vocabulary,
    t5_vocabulary,
    tokenizer_files,
)
from library.models.tokenizers import CLIP_NAME, T5_NAME, FluxTokenizers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("model")
    for name, text in tokenizer_files().items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, "utf-8")
    return root


def test_bytes_and_characters(folder):
    tokens = FluxTokenizers.load(folder / "tokenizers", t5_length=16).tokenize(["A cat", "ü犬"])
    clip, t5 = clip_vocabulary(), t5_vocabulary()
    assert [clip[i] for i in tokens.clip[0][:6]] == [
        "<|startoftext|>",
        "a</w>",
        "c",
        "a",
        "t</w>",
        "<|endoftext|>",
    ]
    assert tokens.clip[0].argmax() == 5  # the first end token, where CLIP pools
    assert [t5[i] for i in tokens.t5[0][:7]] == ["▁", "A", "▁", "c", "a", "t", "</s>"]
    assert [t5[i] for i in tokens.t5[1][:4]] == ["▁", "ü", "<unk>", "</s>"]
    assert tokens.t5_mask.tolist() == [[1] * 7 + [0] * 9, [1] * 4 + [0] * 12]
    assert {t.dtype for t in tokens} == {torch.int64}


def test_every_byte_has_one_entry():
    assert len(set(clip_vocabulary())) == 514
    assert len(set(t5_vocabulary())) == len(t5_vocabulary())


def test_long_captions_are_cut_and_empty_ones_padded(folder):
    tokenizers = FluxTokenizers.load(folder / "tokenizers", t5_length=24)
    tokens = tokenizers.tokenize(["x" * 300, ""])
    assert tokens.clip.shape == (2, 77)
    assert tokens.t5.shape == tokens.t5_mask.shape == (2, 24)
    assert tokens.clip[0, -1] == 513
    assert tokens.t5[0, -1] == 1
    assert tokens.t5_mask.sum(1).tolist() == [24, 1]
    assert tokenizers.lengths(["x" * 300, ""]) == [(302, 302), (2, 1)]


@pytest.mark.parametrize(
    ("clip", "t5"),
    [
        ("openai_clip-vit-large-patch14", "google_t5-v1_1-xxl"),
        ("tokenizer", "tokenizer_2"),
        ("sd1_tokenizer", "t5_tokenizer"),
        ("comfy/sd1_tokenizer", "comfy/text_encoders/t5_tokenizer"),
    ],
)
def test_folder_layouts(folder, tmp_path, clip, t5):
    shutil.copytree(folder / CLIP_FOLDER, tmp_path / clip)
    shutil.copytree(folder / T5_FOLDER, tmp_path / t5)
    tokens = FluxTokenizers.load(tmp_path, t5_length=8).tokenize(["hi"])
    assert tokens.t5[0].tolist()[-4:] == [0] * 4


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's cache folder of a machine without a network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def put_into_hub(hub, name, source):
    target = hub / f"models--{name.replace('/', '--')}"
    commit = "0123456789" * 4
    shutil.copytree(source, target / "snapshots" / commit)
    (target / "refs").mkdir()
    (target / "refs" / "main").write_text(commit)


@pytest.mark.usefixtures("hub")
def test_without_folder_or_network_the_sentence_says_what_to_set(tmp_path):
    with pytest.raises(CheckpointError, match="tokenizer_cache_dir is not set; set tokenizer_cache_dir"):
        FluxTokenizers.load(None)
    with pytest.raises(CheckpointError, match="has no folder openai_clip-vit-large-patch14"):
        FluxTokenizers.load(tmp_path)


def test_what_the_hub_gave_is_kept_for_runs_without_it(folder, tmp_path, hub):
    put_into_hub(hub, CLIP_NAME, folder / CLIP_FOLDER)
    put_into_hub(hub, T5_NAME, folder / T5_FOLDER)
    kept = tmp_path / "kept"
    first = FluxTokenizers.load(kept, t5_length=8).tokenize(["A cat"])
    shutil.rmtree(hub)
    second = FluxTokenizers.load(kept, t5_length=8).tokenize(["A cat"])
    assert len(set(first.clip[0].tolist())) == 6
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_damaged_tokenizer_is_named(folder, tmp_path):
    shutil.copytree(folder / "tokenizers", tmp_path / "tokenizers")
    (tmp_path / "tokenizers" / "google_t5-v1_1-xxl" / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="google_t5-v1_1-xxl cannot be read"):
        FluxTokenizers.load(tmp_path / "tokenizers")
