"""The metadata of files that whole runs wrote, read as other programs read it: header, JSON, text."""

from __future__ import annotations

import ast
import hashlib
import json
import struct
from pathlib import Path

import pytest

from flux_train_network import main
from library.files import metadata as rows
from tests.e2e.running import draw_pictures, write_config

GOLDEN = json.loads((Path(__file__).parents[1] / "data/files/kohya_metadata.json").read_text())["shift"][
    "metadata"
]
AS_JSON = ("ss_bucket_info", "ss_dataset_dirs", "ss_reg_dataset_dirs", "ss_tag_frequency", "ss_datasets")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "2_waves", [(64, 64)] * 2)
    return folder


def header_of(file: Path) -> tuple[dict[str, str], bytes]:
    """Metadata and everything after the header, by the format's own rules and no library."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    metadata = json.loads(data[8 : 8 + length])["__metadata__"]
    assert all(type(key) is type(value) is str for key, value in metadata.items())
    return metadata, data[8 + length :]


def written(folder: Path, pictures: Path, **options: object) -> tuple[dict[str, str], bytes]:
    settings = {"max_train_epochs": None, "max_train_steps": 1, "t5xxl_max_token_length": 16, **options}
    config = write_config(folder / "c.toml", pictures, folder / "out", **settings)
    assert main(["--config_file", str(config), "--console_log_level", "ERROR"]) == 0
    return header_of(folder / "out" / "out.safetensors")


def kind(key: str, text: str) -> str:
    """What a reader makes of a value: JSON, a Python literal of some type, or text. Whole numbers count as numbers."""
    if key in AS_JSON:
        return type(json.loads(text)).__name__
    try:
        found = type(ast.literal_eval(text)).__name__
    except (ValueError, SyntaxError):
        return "text"
    return "number" if found in ("int", "float") else found


def test_a_run_over_folders_writes_every_key_of_the_reference(tmp_path: Path, pictures: Path):
    metadata, body = written(tmp_path, pictures)
    assert metadata.keys() == GOLDEN.keys()
    for key, text in metadata.items():
        if key not in (
            "sshs_legacy_hash",
            "ss_sd_model_hash",
            "ss_new_sd_model_hash",
        ):  # hex, perhaps of digits only
            assert kind(key, text) == kind(key, GOLDEN[key]), f"{key}: {text} but there {GOLDEN[key]}"
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert json.loads(metadata["ss_tag_frequency"]) == {"2_waves": {"waves": 2, "number 0": 1, "number 1": 1}}


def test_a_run_over_a_dataset_file_writes_its_own_keys(tmp_path: Path, pictures: Path):
    regular = draw_pictures(tmp_path / "regular", [(64, 64)])
    file = tmp_path / "d.toml"
    file.write_text(
        f"""
        [general]
        enable_bucket = true
        min_bucket_reso = 32
        max_bucket_reso = 96
        bucket_reso_steps = 16
        [[datasets]]
        resolution = 64
        batch_size = 2
        [[datasets.subsets]]
        image_dir = "{pictures / "2_waves"}"
        num_repeats = 3
        keep_tokens = 1
        [[datasets.subsets]]
        image_dir = "{regular}"
        is_reg = true
        class_tokens = "waves"
        """,
        encoding="utf-8",
    )
    (tmp_path / "old.vae.pt").write_bytes(b"named and never read")
    metadata, _ = written(
        tmp_path, pictures, dataset_config=str(file), train_data_dir=None, optimizer_type="Adafactor",
        unet_lr=1e-4, vae=str(tmp_path / "old.vae.pt"), network_args=["loraplus_lr_ratio=2"],
    )  # fmt: skip
    folder_only = {*rows.FOLDER_KEYS, *rows.FOLDER_OPTION_KEYS} - rows.DATASET_CONFIG_KEYS.keys()
    vae = {"ss_vae_name", "ss_vae_hash", "ss_new_vae_hash"}
    assert metadata.keys() == (GOLDEN.keys() - folder_only) | vae | {"ss_datasets", "ss_network_args"}
    (dataset,) = json.loads(metadata["ss_datasets"])
    assert dataset["bucket_info"]["buckets"] == {"0": {"resolution": [64, 64], "count": 12}}
    first, second = dataset["subsets"]
    assert (first["image_dir"], first["num_repeats"], first["img_count"], first["keep_tokens"]) == (
        "2_waves",
        3,
        2,
        1,
    )
    assert (second["image_dir"], second["is_reg"], second["class_tokens"]) == ("regular", True, "waves")
    assert (dataset["num_train_images"], dataset["num_reg_images"]) == (6, 1)
    assert json.loads(metadata["ss_dataset_dirs"]) == {"2_waves": {"n_repeats": 3, "img_count": 2}}
    # Adafactor's relative steps use none of the rates, and the file says so as Kohya's does.
    assert metadata["ss_learning_rate"] == metadata["ss_unet_lr"] == metadata["ss_text_encoder_lr"] == "None"
    assert metadata["ss_lr_scheduler"] == "adafactor:0.001"
    assert metadata["ss_vae_name"] == "old.vae.pt"
    assert metadata["ss_new_vae_hash"] == hashlib.sha256(b"named and never read").hexdigest()
    assert json.loads(metadata["ss_network_args"])["loraplus_lr_ratio"] == "2"


def test_no_metadata_leaves_what_loaders_need(tmp_path: Path, pictures: Path):
    metadata, body = written(tmp_path, pictures, no_metadata=True)
    modelspec = {key for key in GOLDEN if key.startswith("modelspec.")}
    hashes = {"sshs_model_hash", "sshs_legacy_hash"}
    assert metadata.keys() == rows.MINIMUM_KEYS - {"ss_network_args"} | modelspec | hashes
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
