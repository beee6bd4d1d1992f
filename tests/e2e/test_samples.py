"""Sample pictures in whole runs: dealt over ranks, of no effect on training, and what they and the files carry."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from flux_train_network import main
from library.adapters.text import FluxTextEncoders
from library.files.model_card import MARK
from library.models.autoencoder import AutoEncoder
from library.models.flux import SingleStreamBlock
from tests.e2e.running import draw_pictures, run, write_config

# No machine has the memory for the noise of this one: 2^48 bytes.
TOO_LARGE = "far too large --w 16777216 --h 16777216 --s 1"
SHORT: dict[str, object] = {
    "max_train_epochs": None, "max_train_steps": 4, "t5xxl_max_token_length": 16, "learning_rate": 1e-2,
    "network_dropout": 0.3, "save_state_on_train_end": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "1_waves", [(64, 64)] * 4)
    return folder


def trained(folder: Path, pictures: Path, *arguments: str, **changes: object) -> Path:
    """The output folder of a run in this process."""
    folder.mkdir(exist_ok=True)
    config = write_config(folder / "c.toml", pictures, folder / "out", **{**SHORT, **changes})
    assert main(["--config_file", str(config), *arguments]) == 0
    return folder / "out"


def losses(output: Path) -> list[float]:
    """The loss of each step of the last epoch of a finished run."""
    return json.loads((output / "out-state" / "train_state.json").read_text(encoding="utf-8"))["losses"]


def picture_of(output: Path, pattern: str) -> Image.Image:
    (path,) = (output / "sample").glob(pattern)
    return Image.open(path)


def pixels(output: Path, pattern: str) -> np.ndarray[Any, Any]:
    return np.asarray(picture_of(output, pattern))


def test_nothing_that_happens_to_a_sample_shows_in_training(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    swapped = {
        "blocks_to_swap": 1
    }  # so that a forward pass that ends in the middle has something to leave behind
    quiet = trained(tmp_path / "quiet", pictures, **swapped)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(
        f"a --w 64 --h 64 --s 1 --m 0.5\n{TOO_LARGE}\nb --w 64 --h 64 --s 1\nc --w 64 --h 64 --s 1\n"
    )
    decode, times = AutoEncoder.decode, 0

    def fails_at_times(self: AutoEncoder, latents: torch.Tensor) -> torch.Tensor:
        nonlocal times
        times += 1
        if times == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        if times == 3:
            raise ZeroDivisionError("an accident")
        return decode(self, latents)

    monkeypatch.setattr(AutoEncoder, "decode", fails_at_times)
    inside = SingleStreamBlock.forward

    def fails_inside(self: SingleStreamBlock, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        if not self.training and times == 5:
            raise RuntimeError("in the middle of the transformer")
        return inside(self, x, *arguments)

    monkeypatch.setattr(SingleStreamBlock, "forward", fails_inside)
    capsys.readouterr()
    busy = trained(
        tmp_path / "busy",
        pictures,
        sample_prompts=str(prompts),
        sample_every_n_steps=2,
        sample_at_first=True,
        **swapped,
    )
    said = capsys.readouterr().err
    assert re.search(
        r"WARNING sample prompt 2 was not drawn, and training goes on: RuntimeError: .*allocate", said
    )
    assert (
        "WARNING sample prompt 3 was not drawn, and training goes on: OutOfMemoryError: CUDA out of" in said
    )
    assert (
        "WARNING sample prompt 4 was not drawn, and training goes on: ZeroDivisionError: an accident" in said
    )
    assert "WARNING sample prompt 4 was not drawn, and training goes on: RuntimeError: in the middle" in said
    assert len(list((busy / "sample").glob("*.png"))) == 3  # from the last failure on there are none
    assert losses(quiet) == losses(busy)
    assert len(losses(quiet)) == 2
    first, second = (load_file(output / "out.safetensors") for output in (quiet, busy))
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_two_ranks_share_five_prompts_and_survive_a_sixth(tmp_path: Path, pictures: Path):
    prompts = tmp_path / "prompts.txt"
    lines = [f"waves {n} --w 64 --h 64 --s 1 --d {n}" for n in range(5)]
    prompts.write_text("\n".join([*lines, TOO_LARGE]))
    # Dropouts are drawn by the micro-batch, so only without them is the loss that of other micro-batches.
    shared: dict[str, object] = {**SHORT, "network_dropout": None, "global_batch_size": 2}
    config = write_config(
        tmp_path / "two.toml", pictures, tmp_path / "two", **shared, train_batch_size=1, sample_prompts=str(prompts),
        sample_every_n_steps=3, logging_dir=str(tmp_path / "logs"),
    )  # fmt: skip
    said = run(config, processes=2).stderr
    names = sorted(path.name for path in (tmp_path / "two" / "sample").iterdir())
    assert [re.sub(r"\d{14}", "TIME", name) for name in names] == [
        f"out_000003_{n:02d}_TIME_{n}.png" for n in range(5)
    ]
    assert said.count("sample prompt 6 was not drawn") == 1  # by the second rank, which shows nothing else
    (events,) = (tmp_path / "logs").glob("*/network_train")
    tags = EventAccumulator(str(events)).Reload().Tags()["images"]
    assert tags == [f"sample_{n}" for n in range(5)], "those of both ranks"
    card = (tmp_path / "two" / "out.md").read_text(encoding="utf-8")
    assert card.count("![") == 5
    one = trained(tmp_path / "one", pictures, **{**shared, "train_batch_size": 2})
    assert losses(tmp_path / "two") == pytest.approx(losses(one), rel=1e-5)


@pytest.mark.parametrize(
    "network", [{}, {"network_module": "lycoris.kohya", "network_args": ["algo=loha"]}], ids=["lora", "loha"]
)
def test_a_prompt_has_its_own_strength(tmp_path: Path, pictures: Path, network: dict[str, object]):
    picture = "waves --w 64 --h 64 --s 2 --d 3"
    output = trained(
        tmp_path, pictures, sample_prompts=f"{picture}\n{picture} --m 0\n{picture} --m 0.5", sample_at_first=True,
        sample_every_n_steps=4, learning_rate=5e-2, **network,
    )  # fmt: skip
    base, unchanged, half, full = (
        pixels(output, f"out_{name}_*.png") for name in ("000000_00", "000004_01", "000004_02", "000004_00")
    )
    assert np.array_equal(base, unchanged)
    assert not np.array_equal(base, full)
    assert not np.array_equal(half, full)
    assert not np.array_equal(half, base)


def test_pictures_and_files_carry_their_workflow_and_a_card_goes_with_them(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
):
    encoded: list[str] = []
    encode = FluxTextEncoders.encode

    def counted(self: FluxTextEncoders, captions: list[str], *more: Any) -> Any:
        encoded.extend(captions)
        return encode(self, captions, *more)

    monkeypatch.setattr(FluxTextEncoders, "encode", counted)
    output = trained(
        tmp_path, pictures, sample_prompts="[trigger] | sea --w 64 --h 96 --s 2 --d 3 --n unused\nfree --s 1 --m 0",
        trigger_word="ohwx", sample_every_n_steps=1, sample_at_first=True, save_every_n_steps=2, max_train_steps=5,
        save_last_n_steps=1, metadata_description="Waves <b>", metadata_license="mit", metadata_tags="sea, waves",
    )  # fmt: skip
    assert encoded.count("ohwx | sea") == 1, "sample prompts are encoded once, before training"
    assert "unused" not in encoded
    names = {path.name for path in output.iterdir()}
    assert names == {
        "out-step00000004.safetensors", "out-step00000004.workflow.json", "out.safetensors", "out.workflow.json",
        "out.md", "out-state", "sample", "out-log.jsonl", "out.report.html",
    }  # fmt: skip

    def lora(pattern: str) -> list[tuple[str, float]]:
        picture = picture_of(output, pattern)
        nodes = json.loads(picture.text["prompt"]).values()
        return [
            (node["inputs"]["lora_name"], node["inputs"]["strength_model"])
            for node in nodes
            if node["class_type"] == "LoraLoaderModelOnly"
        ]

    assert lora("out_000000_00_*.png") == []  # the base model: nothing is trained yet
    assert lora("out_000004_00_*.png") == [("out-step00000004.safetensors", 1.0)]
    assert lora("out_000004_01_*.png") == [("out-step00000004.safetensors", 0.0)]
    assert lora("out_000003_00_*.png") == [("out.safetensors", 1.0)]  # no file was saved there
    assert "no file was saved" in picture_of(output, "out_000003_00_*.png").text["workflow"]
    assert lora("out_000005_00_*.png") == [("out.safetensors", 1.0)]
    said = picture_of(output, "out_000005_00_*.png").text["parameters"]
    assert said.startswith("ohwx | sea <lora:out:1>\nSteps: 2, Sampler: Euler")
    assert "Seed: 3, Size: 64x96, Model: flux, " in said

    workflow = json.loads((output / "out.workflow.json").read_text(encoding="utf-8"))
    values = {
        node["type"]: node["widgets_values"]
        for node in workflow["nodes"]
        if node["title"] != "Negative prompt"
    }
    assert values["LoraLoaderModelOnly"] == ["out.safetensors", 0.8]
    assert values["UNETLoader"][0] == "flux.safetensors"
    assert values["DualCLIPLoader"] == ["t5xxl.safetensors", "clip_l.safetensors", "flux"]
    assert values["VAELoader"] == ["ae.safetensors"]
    assert values["CLIPTextEncode"] == ["ohwx | sea"]
    assert values["KSampler"][:3] == [3, "randomize", 2]

    card = (output / "out.md").read_text(encoding="utf-8")
    _, front, body = card.split("---\n", 2)
    facts = yaml.safe_load(front)
    assert facts["base_model"] == "polyrank/tiny-flux"
    assert facts["instance_prompt"] == "ohwx"
    assert facts["license"] == "mit"
    assert {"lora", "flux", "diffusers", "sea", "waves"} <= set(facts["tags"])
    shown = [entry["output"]["url"] for entry in facts["widget"]]
    assert [entry["text"] for entry in facts["widget"]] == ["ohwx | sea", "free"]
    assert all((output / url).is_file() and "_000005_" in url for url in shown)
    assert all(f"]({url})" in body for url in shown)
    assert "Waves \\<b\\>" in body
    assert "| steps | 5 of 5 |" in body
    assert "| rank | 4, alpha 4 |" in body
    assert "is no model of the Hub" in body


def test_a_card_of_ones_own_stays_and_both_can_be_left_out(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    (tmp_path / "out").mkdir()
    card = tmp_path / "out" / "out.md"
    card.write_text("my own words\n", encoding="utf-8")
    trained(tmp_path, pictures, max_train_steps=2, save_every_n_steps=1)
    assert card.read_text(encoding="utf-8") == "my own words\n"
    assert capsys.readouterr().err.count("was not written by a run, so it stays as it is") == 1
    card.write_text(f"old {MARK}", encoding="utf-8")
    trained(tmp_path, pictures, max_train_steps=1)
    assert card.read_text(encoding="utf-8").startswith("---")
    bare = trained(
        tmp_path / "bare",
        pictures,
        "--no_workflow",
        "--no_card",
        "--no_run_log",
        report_every_n_steps=0,
        max_train_steps=1,
        save_state_on_train_end=False,
    )
    assert [path.name for path in bare.iterdir()] == ["out.safetensors"]


def test_prompts_of_a_file_are_encoded_once_for_all_runs(
    tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch
):
    encoded: list[str] = []
    encode = FluxTextEncoders.encode

    def counted(self: FluxTextEncoders, captions: list[str], *more: Any) -> Any:
        encoded.extend(captions)
        return encode(self, captions, *more)

    monkeypatch.setattr(FluxTextEncoders, "encode", counted)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("first --w 64 --h 64 --s 1 --d 1\nsecond --w 64 --h 64 --s 1 --d 1 --l 2 --n not\n")
    options: dict[str, object] = {
        "sample_prompts": str(prompts), "sample_at_first": True, "max_train_steps": 1,
        "cache_text_encoder_outputs_to_disk": True, "mixed_precision": "bf16",
    }  # fmt: skip
    once = trained(tmp_path / "once", pictures, **options)
    assert {"first", "second", "not"} <= set(encoded)
    encoded.clear()
    again = trained(tmp_path / "again", pictures, **options)
    assert encoded == [], "no encoder is needed"
    for name in ("00", "01"):
        assert np.array_equal(*(pixels(output, f"out_000000_{name}_*.png") for output in (once, again)))
    prompts.write_text(prompts.read_text().replace("second", "third"))
    trained(tmp_path / "changed", pictures, **options)
    assert encoded == ["third"]
    encoded.clear()
    trained(tmp_path / "longer", pictures, **{**options, "t5xxl_max_token_length": 17})
    assert {"first", "third", "not"} <= set(encoded), "made with other options"
