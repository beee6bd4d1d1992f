"""The metadata of adapter files against what the reference wrote for the same options."""

from __future__ import annotations

import base64
import json
from dataclasses import replace
from pathlib import Path

import pytest

from library.config.dataset_settings import DatasetSettings, SubsetSettings
from library.config.train_config import OPTIONS, TrainConfig
from library.files import metadata as rows
from library.files.dataset_metadata import BucketFacts, DatasetFacts, tag_frequency
from library.files.metadata import ModelFacts, RunFacts, at_save, build

GOLDEN = json.loads((Path(__file__).parents[1] / "data" / "files" / "kohya_metadata.json").read_text())
# Where we say something else on purpose, or the value is the clock's.
OWN_VALUES = {"ss_sd_scripts_commit_hash", "modelspec.implementation_version", "modelspec.date"}
VAE = ModelFacts(name="ae.safetensors", short_hash="ab", sha256="cd")
HASHES = {"sshs_model_hash", "sshs_legacy_hash"}


def config_of(options: dict[str, object]) -> TrainConfig:
    values = {name: tuple(v) if isinstance(v, list) else v for name, v in options.items() if name in OPTIONS}
    return TrainConfig.from_values(values)


def folder_dataset() -> DatasetFacts:
    """The folder the reference was run on."""
    settings = DatasetSettings(
        resolution=(256, 256),
        batch_size=2,
        enable_bucket=True,
        min_bucket_reso=128,
        max_bucket_reso=512,
        subsets=(
            SubsetSettings(image_dir=Path("/data/simple/3_sks dog"), num_repeats=3, class_tokens="sks dog"),
        ),
    )
    frequency = json.loads(GOLDEN["shift"]["metadata"]["ss_tag_frequency"])
    return DatasetFacts(
        settings=settings,
        image_counts=(10,),
        num_train_images=30,
        num_reg_images=0,
        tag_frequency=frequency,
        buckets=BucketFacts(
            buckets=(((192, 320), 12), ((256, 256), 12), ((320, 192), 6)),
            mean_aspect_error=0.1115471137304171,
        ),
    )


def facts_of(expected: dict[str, str], **changes: object) -> RunFacts:
    facts = RunFacts(
        session_id=int(expected["ss_session_id"]),
        started_at=float(expected["ss_training_started_at"]),
        seed=42,
        datasets=(folder_dataset(),),
        num_validation_images=0,
        num_batches_per_epoch=15,
        num_epochs=1,
        max_train_steps=int(expected["ss_max_train_steps"]),
        world_size=1,
        optimizer="torch.optim.adamw.AdamW",
        model=ModelFacts(
            name="flux.safetensors",
            short_hash=expected["ss_sd_model_hash"],
            sha256=expected["ss_new_sd_model_hash"],
        ),
    )
    return replace(facts, **changes)


@pytest.mark.parametrize("name", ["shift", "lokr"])
def test_every_key_and_value_is_the_references(name: str) -> None:
    expected = dict(GOLDEN[name]["metadata"])
    arguments = {"algo": "lokr", "factor": "4", "dropout": None} if name == "lokr" else None
    built = build(config_of(GOLDEN[name]["options"]), facts_of(expected, network_args=arguments))
    finished = float(expected["ss_training_finished_at"])
    written = at_save(built, step=int(expected["ss_steps"]), epoch=1, finished_at=finished)
    assert written.keys() == expected.keys() - HASHES
    differing = {key for key in written if written[key] != expected[key]} - OWN_VALUES
    # Kohya's config reader leaves a whole number whole.
    assert differing <= {"ss_network_alpha"}
    assert float(written["ss_network_alpha"]) == float(expected["ss_network_alpha"])


def test_each_key_stands_in_one_table_only() -> None:
    tables = [rows.OPTION_KEYS, rows.FACT_KEYS, rows.OPTIONAL_KEYS, rows.MODELSPEC_KEYS]
    for others in ((rows.FOLDER_KEYS, rows.FOLDER_OPTION_KEYS), (rows.DATASET_CONFIG_KEYS,)):
        keys = [key for table in (*tables, *others) for key in table]
        assert len(keys) == len(set(keys))
    assert {*rows.OPTION_KEYS.values(), *rows.FOLDER_OPTION_KEYS.values()} <= OPTIONS.keys()


def test_dataset_config_lists_every_dataset() -> None:
    expected = GOLDEN["shift"]["metadata"]
    second = DatasetFacts(
        settings=DatasetSettings(
            resolution=(512, 768),
            subsets=(
                SubsetSettings(image_dir=Path("/other/3_sks dog"), shuffle_caption=True, keep_tokens=1),
                SubsetSettings(image_dir=Path("/reg/1_dog"), is_reg=True, class_tokens="dog"),
                SubsetSettings(
                    image_dir=Path("/x/imgs"), metadata_file=Path("/x/captions.json"), num_repeats=2
                ),
            ),
        ),
        image_counts=(4, 5, 6),
        num_train_images=16,
        num_reg_images=5,
        tag_frequency={"3_sks dog": {"late": 1}, "captions.json": {"a": 2}},
    )
    facts = facts_of(expected, datasets=(folder_dataset(), second))
    built = build(config_of({"dataset_config": Path("d.toml"), "output_name": "x"}), facts)
    assert (
        not {"ss_resolution", "ss_bucket_info", "ss_reg_dataset_dirs", "ss_total_batch_size"} & built.keys()
    )
    assert json.loads(built["ss_dataset_dirs"]) == {
        "3_sks dog": {"n_repeats": 3, "img_count": 10},
        "3_sks dog (2)": {"n_repeats": 1, "img_count": 4},
        "captions.json": {"n_repeats": 2, "img_count": 6},
    }
    frequency = json.loads(built["ss_tag_frequency"])
    assert frequency["3_sks dog"]["running"] == 1
    assert "late" not in frequency["3_sks dog"]
    assert frequency["captions.json"] == {"a": 2}
    first, other = json.loads(built["ss_datasets"])
    assert first["is_dreambooth"]
    assert first["bucket_info"]["buckets"]["2"] == {"resolution": [320, 192], "count": 6}
    assert not other["is_dreambooth"]
    assert other["resolution"] == [512, 768]
    assert other["bucket_info"] is None
    assert [subset["image_dir"] for subset in other["subsets"]] == ["3_sks dog", "1_dog", "imgs"]
    assert other["subsets"][0]["keep_tokens"] == 1
    assert other["subsets"][0]["is_reg"] is False
    assert other["subsets"][1]["class_tokens"] == "dog"
    assert other["subsets"][2]["metadata_file"] == "captions.json"
    assert "is_reg" not in other["subsets"][2]
    assert (built["ss_num_train_images"], built["ss_num_reg_images"]) == ("46", "5")


def test_no_metadata_keeps_what_readers_need() -> None:
    facts = facts_of(GOLDEN["shift"]["metadata"], network_args={"a": "1", "dropout": 0.1})
    options = {
        "no_metadata": True,
        "network_module": "networks.lora_flux",
        "network_dim": 4,
        "output_name": "n",
    }
    written = at_save(build(config_of(options), facts), step=5, epoch=1, finished_at=0.0)
    assert {key for key in written if key.startswith("ss_")} == rows.MINIMUM_KEYS
    assert json.loads(written["ss_network_args"]) == {"a": "1", "dropout": 0.1}
    assert written["modelspec.title"] == "n"


@pytest.mark.parametrize(
    ("options", "changes", "key", "value"),
    [
        ({}, {}, "modelspec.title", "LoRA@1795334025.707204"),
        ({"metadata_title": "T", "output_name": "o"}, {}, "modelspec.title", "T"),
        ({}, {"is_schnell": True}, "modelspec.architecture", "flux-1-schnell/lora"),
        ({"model_type": "chroma"}, {}, "modelspec.architecture", "chroma/lora"),
        ({"model_type": "chroma"}, {}, "ss_base_model_version", "chroma"),
        ({"min_timestep": 200}, {}, "modelspec.timestep_range", "200,1000"),
        ({"max_timestep": 900}, {}, "modelspec.timestep_range", "0,900"),
        ({"clip_skip": 2}, {}, "modelspec.encoder_layer", "2"),
        ({"metadata_tags": "a,b"}, {}, "modelspec.tags", "a,b"),
        ({"metadata_trigger_phrase": "sks"}, {}, "modelspec.trigger_phrase", "sks"),
        ({}, {"trigger_words": ("a", "b")}, "modelspec.trigger_phrase", "a, b"),
        ({"metadata_trigger_phrase": "sks"}, {"trigger_words": ("a",)}, "modelspec.trigger_phrase", "sks"),
        ({"text_encoder_lr": (1e-4, 2e-5)}, {}, "ss_text_encoder_lr", "[0.0001, 2e-05]"),
        ({"text_encoder_lr": (1e-4, 2e-5)}, {"single_text_encoder_lr": True}, "ss_text_encoder_lr", "0.0001"),
        ({"gradient_accumulation_steps": 3}, {"world_size": 4}, "ss_total_batch_size", "24"),
        ({"learning_rate": 2e-4}, {"optimizer_sets_rate": True}, "ss_lr_scheduler", "adafactor:0.0002"),
        ({"unet_lr": 2e-4}, {"optimizer_sets_rate": True}, "ss_unet_lr", "None"),
        ({}, {"vae": VAE}, "ss_vae_name", "ae.safetensors"),
        ({}, {"vae": VAE}, "ss_new_vae_hash", "cd"),
    ],
)  # fmt: skip
def test_single_values(options: dict[str, object], changes: dict[str, object], key: str, value: str) -> None:
    assert build(config_of(options), facts_of(GOLDEN["shift"]["metadata"], **changes))[key] == value


def test_keys_that_are_not_set_are_left_out() -> None:
    built = build(config_of({}), facts_of(GOLDEN["shift"]["metadata"], model=ModelFacts(name="someone/flux")))
    assert built["ss_sd_model_name"] == "someone/flux"
    absent = {"ss_sd_model_hash", "ss_new_sd_model_hash", "ss_network_args", "ss_vae_name"}
    absent |= {f"modelspec.{name}" for name in ("thumbnail", "timestep_range", "author", "encoder_layer")}
    assert not absent & built.keys()


def test_thumbnail_is_a_data_url(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.jpg").write_bytes(b"\xff\xd8picture")
    facts = facts_of(GOLDEN["shift"]["metadata"])

    def thumbnail(given: str) -> str | None:
        return build(config_of({"metadata_thumbnail": given}), facts).get("modelspec.thumbnail")

    url = thumbnail(str(tmp_path / "t.jpg"))
    kind, _, data = url.partition(";base64,")
    assert kind == "data:image/jpeg"
    assert base64.b64decode(data) == b"\xff\xd8picture"
    assert thumbnail(url) == url
    with caplog.at_level("WARNING", logger="library.files.metadata"):
        assert thumbnail(str(tmp_path / "none.png")) is None
    assert "none.png does not exist" in caplog.text


def test_a_save_changes_steps_and_times_only() -> None:
    built = build(config_of({}), facts_of(GOLDEN["shift"]["metadata"]))
    kept = dict(built)
    early = at_save(built, step=10, epoch=0, finished_at=1795334030.5)
    late = at_save(built, step=20, epoch=1, finished_at=1795334090.25)
    assert (late["ss_steps"], late["ss_epoch"], late["ss_training_finished_at"]) == (
        "20",
        "1",
        "1795334090.25",
    )
    assert built == kept
    assert {key for key in late if early[key] != late[key]} == {
        "ss_steps", "ss_epoch", "ss_training_finished_at", "modelspec.date",
    }  # fmt: skip


def test_tags_are_counted_as_the_reference_counts_them() -> None:
    captions = ["sks dog, running, ", "SKS dog,, Running", "one"]
    assert tag_frequency(captions) == {"sks dog": 2, "running": 2, "one": 1}
