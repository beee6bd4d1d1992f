"""What short runs write into TensorBoard: Kohya's tags, at its x, with the numbers they claim to be.

A tag that Kohya writes twice under a second name (lr/group0 beside lr/unet) is written once; ours beside its own are
norm/grad_norm, speed/*, memory/* and the validation loss at single timesteps.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from flux_train_network import main
from library.adapters.base import Conditions
from library.adapters.flux import FluxTrainModule, ForwardSettings
from library.config.load import load_config
from library.config.sections.network import NetworkConfig
from library.flow.noise import draw_noise
from library.randomness import Visit
from library.train.loading import ModelLoader
from library.train.prepare import locate_models, read_data
from networks.interface import create
from tests.e2e.running import draw_pictures, write_config

Scalars = Mapping[str, list[tuple[int, float]]]
EVERY_RUN = {"loss/current", "loss/average", "loss/epoch_average"}
OURS = {
    "norm/grad_norm", "speed/seconds_per_step", "speed/images_per_second", "speed/data_seconds",
    "speed/forward_backward_seconds", "speed/saving_seconds",
}  # fmt: skip
GOLDEN = sorted([
    "loss/average", "loss/current", "loss/epoch_average",
    "loss/validation/epoch_average", "loss/validation/epoch_divergence", "loss/validation/step_average",
    "loss/validation/step_divergence", *(f"loss/validation/timestep_{t}" for t in (200, 400, 600, 800)),
    "lr/textencoder 1", "lr/textencoder 1 plus", "lr/unet", "lr/unet plus",
    "max_norm/keys_scaled", "max_norm/max_key_norm",
    "norm/avg_combined_norm", "norm/avg_grad_norm", "norm/avg_key_norm", "norm/grad_norm",
    "speed/data_seconds", "speed/forward_backward_seconds", "speed/images_per_second", "speed/sampling_seconds",
    "speed/saving_seconds", "speed/seconds_per_step", "speed/validation_seconds",
])  # fmt: skip
SIZES = [(64, 64)] * 6 + [(96, 64)] * 2
TIMESTEPS = (200, 400, 600, 800)  # the inner four of six points over 0..1000


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "1_waves", SIZES)
    return folder


def logged(folder: Path, pictures: Path, **options: object) -> Scalars:
    """All scalars of a run with these options."""
    settings = {"logging_dir": str(folder / "logs"), "t5xxl_max_token_length": 16, **options}
    config = write_config(folder / "c.toml", pictures, folder / "out", **settings)
    assert main(["--config_file", str(config), "--console_log_level", "ERROR"]) == 0
    (events,) = (folder / "logs").glob("*/network_train")
    accumulated = EventAccumulator(str(events), size_guidance={"scalars": 0}).Reload()
    tags = accumulated.Tags()["scalars"]
    return {tag: [(event.step, event.value) for event in accumulated.Scalars(tag)] for tag in tags}


def steps(scalars: Scalars, tag: str) -> list[int]:
    return [x for x, _ in scalars[tag]]


def values(scalars: Scalars, tag: str) -> list[float]:
    return [value for _, value in scalars[tag]]


def network_losses(config: Path, file: Path | None) -> dict[int, float]:
    """The validation loss of the model with `file` by timestep, from caches on disk and the formula, without ours."""
    options = load_config(["--config_file", str(config)]).config
    loader, cpu = ModelLoader(options, locate_models(options.model)), torch.device("cpu")
    transformer, encoders = loader.transformer(cpu), loader.text_encoders(cpu)
    settings = NetworkConfig(
        network_module="networks.lora_flux", network_dim=4, network_train_unet_only=True,
        network_weights=None if file is None else str(file), dim_from_weights=file is not None,
    )  # fmt: skip
    network = create(settings, text_encoders=[], transformer=transformer)
    network.apply()
    root = FluxTrainModule(
        transformer=transformer, network=network.module, clip_l=None, t5=None,
        settings=ForwardSettings(guidance_scale=1.0, apply_t5_attn_mask=False, autocast_dtype=None),
    ).eval()  # fmt: skip

    losses: dict[int, list[Tensor]] = {t: [] for t in TIMESTEPS}
    data = read_data(options, seed=7, world_size=1)
    assert data.discovered.validation
    for record in data.discovered.validation:
        (cache,) = record.path.parent.glob(f"{record.path.stem}_*_flux.npz")
        with np.load(cache) as arrays:
            (name,) = (key for key in arrays.files if key.startswith("latents_"))
            x = torch.from_numpy(arrays[name])[None].float()
        noise = draw_noise(11, [Visit(record.key, 0)], x.shape[1:])
        for t in TIMESTEPS:
            s = t / 1000
            text = Conditions(text=encoders.encode([record.caption]), tokens=None)
            with torch.no_grad():
                answer = root((1 - s) * x + s * noise, torch.tensor([s]), text)
            losses[t].append((answer - (noise - x)).square().mean())
    return {t: float(torch.stack(each).mean()) for t, each in losses.items()}


def test_lora_with_validation(tmp_path: Path, pictures: Path):
    # Eight pictures, two held back; six in batches of two are three or four steps an epoch.
    scalars = logged(
        tmp_path, pictures, validation_split=0.25, validation_seed=11, validate_every_n_steps=2,
        max_train_epochs=2, cache_latents_to_disk=True, learning_rate=1e-2, lr_scheduler="linear", unet_lr=5e-3,
    )  # fmt: skip
    validation = {f"loss/validation/{kind}" for kind in (
        "step_average", "step_divergence", "epoch_average", "epoch_divergence",
    )}  # fmt: skip
    by_timestep = {f"loss/validation/timestep_{t}" for t in TIMESTEPS}
    assert set(scalars) == EVERY_RUN | OURS | validation | by_timestep | {
        "lr/unet", "norm/avg_grad_norm", "speed/validation_seconds",
    }  # fmt: skip
    total = len(scalars["loss/current"])
    epoch = total // 2
    for tag in ("loss/current", "loss/average", "lr/unet", "norm/avg_grad_norm", "norm/grad_norm"):
        assert steps(scalars, tag) == list(range(1, total + 1)), tag
    for tag in ("loss/epoch_average", "loss/validation/epoch_average", "loss/validation/epoch_divergence"):
        assert steps(scalars, tag) == [1, 2], tag
    due = sorted({0, epoch, total, *range(2, total + 1, 2)})
    assert steps(scalars, "loss/validation/step_average") == due
    assert steps(scalars, "loss/validation/step_divergence") == due[1:]
    for tag in by_timestep:
        assert steps(scalars, tag) == due
    means = np.mean([values(scalars, tag) for tag in sorted(by_timestep)], axis=0)
    assert means == pytest.approx(values(scalars, "loss/validation/step_average"), rel=1e-6)

    current, average = values(scalars, "loss/current"), values(scalars, "loss/average")
    for step in range(1, total + 1):  # the mean over the last epoch's worth of steps
        window = current[max(0, step - epoch) : step]
        assert average[step - 1] == pytest.approx(sum(window) / len(window), rel=1e-6)
    assert values(scalars, "loss/epoch_average") == pytest.approx([average[epoch - 1], average[-1]])
    assert values(scalars, "lr/unet") == pytest.approx([5e-3 * (1 - step / total) for step in range(total)])

    by_step = dict(scalars["loss/validation/step_average"])
    assert values(scalars, "loss/validation/epoch_average") == [by_step[epoch], by_step[total]]
    for x, divergence in scalars["loss/validation/step_divergence"]:
        assert divergence == pytest.approx(by_step[x] - average[x - 1], rel=1e-4, abs=1e-6)
    config = tmp_path / "c.toml"
    before, after = (network_losses(config, file) for file in (None, tmp_path / "out" / "out.safetensors"))
    for step, losses in ((0, before), (total, after)):
        assert by_step[step] == pytest.approx(sum(losses.values()) / len(losses), rel=1e-5)
        for t, loss in losses.items():
            assert dict(scalars[f"loss/validation/timestep_{t}"])[step] == pytest.approx(loss, rel=1e-5)
    assert by_step[total] != pytest.approx(by_step[0], rel=1e-3)


def test_all_that_a_run_with_everything_shows(tmp_path: Path, pictures: Path):
    """Every tag there is on a CPU, and the text and pictures beside them; a GPU adds memory/peak_gb."""
    prompts = tmp_path / "p.txt"
    prompts.write_text("waves --w 32 --h 32 --s 1\nmore --w 32 --h 32 --s 1\n", encoding="utf-8")
    scalars = logged(
        tmp_path, pictures, validation_split=0.25, validate_every_n_steps=2, max_train_epochs=1, ema_decay=0.9,
        ema_for_samples=True, keep_best=True, early_stop_patience=9, network_train_unet_only=None,
        cache_text_encoder_outputs=None, text_encoder_lr=[1e-4], log_config=True, log_prefix="full-",
        network_args=["ggpo_sigma=0.03", "ggpo_beta=0.01", "loraplus_lr_ratio=4"], scale_weight_norms=1.0,
        sample_prompts=str(prompts), sample_every_n_epochs=1,
    )  # fmt: skip
    assert sorted(scalars) == GOLDEN
    (events,) = (tmp_path / "logs").glob("full-*/network_train")
    accumulated = EventAccumulator(str(events)).Reload()
    assert accumulated.Tags()["images"] == ["sample_0", "sample_1"]
    (text,) = (
        event.tensor_proto.string_val[0].decode() for event in accumulated.Tensors("config/text_summary")
    )
    assert "| ema_decay | 0.9 |" in text
    assert not any(f"| {name} |" in text for name in ("output_dir", "logging_dir", "wandb_api_key"))


def test_validation_takes_as_many_batches_as_it_is_told(tmp_path: Path, pictures: Path):
    scalars = logged(
        tmp_path, pictures, validation_split=0.5, validate_every_n_epochs=2, max_validation_steps=1,
        train_batch_size=1, max_train_epochs=4, min_timestep=100, max_timestep=600, save_state_on_train_end=True,
    )  # fmt: skip
    assert steps(scalars, "loss/validation/epoch_average") == [2, 4]
    assert steps(scalars, "loss/validation/step_average") == [0, 8, 16]
    state = json.loads((tmp_path / "out" / "out-state" / "train_state.json").read_text())
    assert [step for step, _ in state["validation_losses"]] == [0, 8, 16]


def test_preserved_pictures_are_validated_by_the_target_they_are_trained_to(tmp_path: Path, pictures: Path):
    """An untrained network answers as the frozen model does, so nothing is lost; what it learns elsewhere shows."""
    kept = draw_pictures(tmp_path / "kept", [(64, 64)] * 4)
    datasets = tmp_path / "d.toml"
    datasets.write_text(
        f"""
        [[datasets]]
        resolution = 64
        [[datasets.subsets]]
        image_dir = "{pictures / "1_waves"}"
        [[datasets.subsets]]
        image_dir = "{kept}"
        validation_split = 0.5
        custom_attributes = {{ diff_output_preservation = true }}
        """,
        encoding="utf-8",
    )
    scalars = logged(
        tmp_path, pictures, dataset_config=str(datasets), train_data_dir=None, learning_rate=1e-3,
        max_train_epochs=None, max_train_steps=4,
    )  # fmt: skip
    first, last = values(scalars, "loss/validation/step_average")
    assert first < 1e-9
    assert 1e-5 < last < values(scalars, "loss/average")[-1]


def test_lycoris_with_prodigy(tmp_path: Path, pictures: Path):
    scalars = logged(
        tmp_path, pictures, network_module="lycoris.kohya", network_args=["algo=locon"], optimizer_type="Prodigy",
        optimizer_args=["d0=1e-5", "d_coef=2"], learning_rate=0.5, max_train_epochs=None, max_train_steps=6,
    )  # fmt: skip
    assert set(scalars) == EVERY_RUN | OURS | {"lr/unet", "lr/d*lr/unet"}
    assert values(scalars, "lr/unet") == [0.5] * 6
    adapted = values(scalars, "lr/d*lr/unet")
    assert adapted[0] == pytest.approx(0.5 * 1e-5)  # d0: what the first step is taken with
    assert adapted == sorted(adapted)
    assert adapted[-1] > 2 * adapted[0]


def test_ggpo_with_limited_norms(tmp_path: Path, pictures: Path):
    most = 0.02
    scalars = logged(
        tmp_path, pictures, network_args=["ggpo_sigma=0.03", "ggpo_beta=0.01", "loraplus_lr_ratio=4"],
        scale_weight_norms=most, max_train_epochs=None, max_train_steps=3, learning_rate=1e-2,
    )  # fmt: skip
    norms = {"norm/avg_key_norm", "norm/avg_grad_norm", "norm/avg_combined_norm"}
    limits = {"max_norm/keys_scaled", "max_norm/max_key_norm"}
    assert set(scalars) == EVERY_RUN | OURS | norms | limits | {"lr/unet", "lr/unet plus"}
    assert values(scalars, "lr/unet plus") == pytest.approx([4e-2] * 3)
    file = load_file(tmp_path / "out" / "out.safetensors")
    layers = [key.removesuffix(".alpha") for key in file if key.endswith(".alpha")]
    deltas = [
        file[f"{name}.lora_up.weight"] @ file[f"{name}.lora_down.weight"]
        * (file[f"{name}.alpha"] / file[f"{name}.lora_down.weight"].shape[0])
        for name in layers
    ]  # fmt: skip
    found = torch.stack([delta.norm() for delta in deltas])
    assert values(scalars, "max_norm/max_key_norm")[-1] == pytest.approx(float(found.max()), rel=1e-3)
    assert values(scalars, "norm/avg_key_norm")[-1] == pytest.approx(float(found.mean()), rel=1e-3)
    assert float(found.max()) <= most * 1.001
    assert 0 < values(scalars, "max_norm/keys_scaled")[-1] <= len(layers)
    assert min(values(scalars, "norm/avg_combined_norm")) > 0
    assert values(scalars, "norm/avg_grad_norm")[-1] > 0
