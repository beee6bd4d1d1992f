"""The trigger word in prompts, and what the tokenizers say of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.config.dataset_settings import DatasetSettings, SubsetSettings
from library.config.prompts import SamplePrompt
from library.models.tiny_tokenizers import CLIP_FOLDER, T5_FOLDER, tokenizer_files
from library.models.tokenizers import FluxTokenizers
from library.train.trigger import doubts, fill_prompts, trigger_words


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory) -> FluxTokenizers:
    """Small tokenizers to which "dog" and "sks" are one token of CLIP-L, "dog" alone one of T5."""
    folder = tmp_path_factory.mktemp("model")
    files = dict(tokenizer_files())
    vocabulary = json.loads(files[f"{CLIP_FOLDER}/vocab.json"])
    for merged in ("do", "dog</w>", "sk", "sks</w>"):
        vocabulary[merged] = len(vocabulary)
    files[f"{CLIP_FOLDER}/vocab.json"] = json.dumps(vocabulary)
    files[f"{CLIP_FOLDER}/merges.txt"] = "#version: 0.2\nd o\ndo g</w>\ns k\nsk s</w>\n"
    t5 = json.loads(files[f"{T5_FOLDER}/tokenizer.json"])
    t5["model"]["vocab"].append(["\u2581dog", -1.0])
    files[f"{T5_FOLDER}/tokenizer.json"] = json.dumps(t5)
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, "utf-8")
    return FluxTokenizers.load(folder / "tokenizers")


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("sks", None),
        ("ohwx", None),
        ("sks dog", None),
        ("dog", "'dog' is a word that the text encoders know"),
        ("dog dog", "is a word that the text encoders know"),
        ("my_style_v2", "falls into 11 tokens for CLIP-L and 11 for T5"),
        ("\u72ac", "has a character that T5 does not know"),
    ],
)
def test_doubtful_words(tokenizers, word, said):
    found = doubts([word], tokenizers)
    assert len(found) == (said is not None)
    assert (said or "") in "".join(found)


def test_tokenizers_that_are_not_here_are_not_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert FluxTokenizers.load_local(tmp_path, t5_length=8) is None
    assert list(tmp_path.iterdir()) == []


def test_prompts_get_the_only_trigger_word():
    prompts = (SamplePrompt(index=0, prompt="[trigger] in a tree", negative_prompt="no [trigger]"),)
    (filled,), notices = fill_prompts(prompts, ["ohwx"])
    assert (filled.prompt, filled.negative_prompt, notices) == ("ohwx in a tree", "no ohwx", ())
    plain = (SamplePrompt(index=0, prompt="a tree"),)
    assert fill_prompts(plain, ["ohwx"]) == (plain, ())
    for words, reason in (((), "there is no trigger_word"), (("a", "b"), "there are several: a, b")):
        left, (notice,) = fill_prompts(prompts, words)
        assert left == prompts
        assert reason in notice


def test_trigger_words_of_all_subsets():
    subsets = [
        SubsetSettings(image_dir=Path(word or "x"), trigger_word=word) for word in ("b", None, "a", "", "b")
    ]
    assert trigger_words([DatasetSettings(resolution=(64, 64), subsets=tuple(subsets))]) == ("b", "a")
