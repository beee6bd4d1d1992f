"""Whole runs' inputs with text outputs cached and without: the same captions, the same outputs, the same drops."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from safetensors import safe_open

from flux_train_network import main
from library.config.load import load_config
from library.data.dataset import load_batches
from library.data.records import Batch
from library.train.caching import CachingPhase
from library.train.loading import ModelLoader
from library.train.prepare import Data, locate_models, read_data
from library.train.setup import connected
from tests.e2e.running import draw_pictures, write_config

CAPTIONS = (
    "a {red|green|blue} wave, Ohwx ||| foam, spray;;;mist, {{cold}}, light, wind ||| photo\nsecond, line, of, tags",
    "one, two, three, four, five, six, seven",
    "no tags but a sentence by [trigger]",
)
EVERY_OPTION = {
    "shuffle_caption": True, "keep_tokens": 1, "keep_tokens_separator": "|||", "secondary_separator": ";;;",
    "enable_wildcard": True, "caption_prefix": "seen:", "caption_suffix": "{at dawn|at dusk}",
    "caption_dropout_rate": 0.2, "caption_dropout_every_n_epochs": 3, "caption_tag_dropout_rate": 0.2,
    "token_warmup_min": 1, "token_warmup_step": 0.4, "trigger_word": "ohwx", "max_train_epochs": 4,
}  # fmt: skip


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = draw_pictures(
        tmp_path / "data" / "2_waves", [(64, 64), (96, 64), (64, 64), (64, 64)], captions=False
    )
    for number, caption in enumerate(CAPTIONS):  # the fourth picture has the class token
        (folder / f"picture{number}.txt").write_text(caption, encoding="utf-8")
    return folder.parent


def inputs(config_file: Path) -> tuple[list[Batch], list[Batch], Data]:
    """All batches of a run, as they are trained on, and as they are without the text cache, encoded one by one."""
    config = load_config(["--config_file", str(config_file)]).config
    loader = ModelLoader(config, locate_models(config.model))
    data = read_data(config, seed=7, world_size=1)
    with connected(config) as backend:
        phase = CachingPhase(config=config, loader=loader, backend=backend, console=Console(stderr=True))
        cached, _ = phase.text(data, [])
        encoders = loader.text_encoders(torch.device("cpu"))
    live = []
    for batch in load_batches(data.training, data.plan):
        assert batch.text is None
        texts = [encoders.encode([caption]) for caption in batch.captions]
        names = ("clip_pooled", "t5_hidden", "t5_mask")
        text = replace(texts[0], **{name: torch.cat([getattr(t, name) for t in texts]) for name in names})
        live.append(replace(batch, text=text))
    return list(load_batches(cached.training, cached.plan)), live, cached


@pytest.mark.parametrize(("precision", "to_disk"), [("bf16", True), ("no", False)])
def test_batches_of_a_run_are_the_same_cached_and_live(tmp_path, pictures, to_disk, precision):
    config = write_config(
        tmp_path / "c.toml", pictures, tmp_path / "out", **EVERY_OPTION, cache_latents=False, flip_aug=True,
        mixed_precision=precision, cache_text_encoder_outputs_to_disk=to_disk, text_encoder_batch_size=1,
    )  # fmt: skip
    cached, live, data = inputs(config)
    assert len(cached) == len(live) == data.plan.total_steps == 16
    for one, other in zip(cached, live, strict=True):
        assert (one.visits, one.captions) == (other.visits, other.captions)
        assert one.text.t5_hidden.shape == other.text.t5_hidden.shape
        for name in ("clip_pooled", "t5_hidden", "t5_mask"):
            assert torch.equal(
                getattr(one.text, name), getattr(other.text, name).to(getattr(one.text, name).dtype)
            )
        assert torch.equal(one.images, other.images)
        assert torch.equal(one.shares, other.shares)
    captions = {caption for batch in cached for caption in batch.captions}
    assert "" in captions
    assert len(captions) > 12
    assert all(re.search("ohwx", caption, re.IGNORECASE) for caption in captions if caption)
    assert bool(list(pictures.rglob("*_flux_te.npz"))) == to_disk


def test_captions_do_not_depend_on_other_images(tmp_path, pictures):
    config = write_config(
        tmp_path / "c.toml", pictures, tmp_path / "out", **{**EVERY_OPTION, "token_warmup_step": 0}
    )

    def seen() -> dict[tuple[str, int], str]:
        data = read_data(load_config(["--config_file", str(config)]).config, seed=7, world_size=1)
        batches = load_batches(data.training, data.plan)
        return {tuple(v): c for batch in batches for v, c in zip(batch.visits, batch.captions, strict=True)}

    before = seen()
    (pictures / "2_waves" / "picture0.png").unlink()
    after = seen()
    assert len(after) == 24
    assert after == {visit: before[visit] for visit in after}


def test_a_placeholder_without_a_trigger_word_is_told(tmp_path, pictures):
    config = load_config(
        ["--config_file", str(write_config(tmp_path / "c.toml", pictures, tmp_path / "out"))]
    ).config
    told = [notice for notice in read_data(config, seed=7, world_size=1).notices if "[trigger]" in notice]
    assert told == [
        "2_waves: 1 of 4 captions have [trigger] and keep it as it is, since there is no trigger_word for them: "
        "picture2.png"
    ]


def test_a_run_with_every_option_trains_and_names_its_trigger_word(tmp_path, pictures, capfd):
    output = tmp_path / "out"
    config = write_config(
        tmp_path / "c.toml", pictures, output, **{**EVERY_OPTION, "max_train_epochs": 2},
        cache_text_encoder_outputs_to_disk=True, text_cache_variants=3, validation_split=0.25,
        validate_every_n_epochs=2, sample_every_n_epochs=2,
        sample_prompts="[trigger] at sea --w 64 --h 64 --s 1 --n not [trigger]",
    )  # fmt: skip
    assert main(["--config_file", str(config), "--dry_run"]) == 0
    printed = capfd.readouterr().out
    assert re.search(r"text encoder outputs +0 of \d+ there, \d+ to encode, \d+\.\d MB to write", printed)
    assert not list(pictures.rglob("*.npz"))
    assert main(["--config_file", str(config)]) == 0
    said = " ".join(capfd.readouterr().err.split())
    assert re.search(r"\d+ captions to encode, about \d+\.\d MB on disk", said)
    assert "an image has 3 captions at most by shuffle_caption, enable_wildcard, token_warmup_step" in said
    assert "captions lack the trigger word 'ohwx' and get it put first" in said
    assert "ohwx at sea" in said
    assert "[trigger]" not in said
    with safe_open(output / "out.safetensors", framework="pt") as file:
        assert file.metadata()["modelspec.trigger_phrase"] == "ohwx"
