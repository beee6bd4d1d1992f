"""Whole runs of the tiny model from configs of other programs, as their users have them but for paths and sizes."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import yaml
from safetensors import safe_open

from flux_train_network import main
from tests.e2e.running import TINY, draw_pictures, run

MODELS = [word for name in ("clip_l", "t5xxl", "ae", "tokenizer_cache_dir") for word in (f"--{name}", TINY)]
SAMPLES = Path(__file__).parents[1] / "data" / "config" / "importers"


def loras(file: Path) -> tuple[set[str], dict[str, str]]:
    """The names of the layers in a file, and its metadata."""
    with safe_open(file, "pt") as opened:
        return {key.split(".")[0] for key in opened.keys()}, opened.metadata()  # noqa: SIM118


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return draw_pictures(tmp_path / "pictures", [(64, 64), (96, 64), (64, 96)])


def gui(folder: Path, pictures: Path) -> Path:
    preset = json.loads((SAMPLES / "gui.json").read_text(encoding="utf-8"))
    named = draw_pictures(folder / "named" / "2_heron", [(64, 64), (96, 64)])
    preset |= {
        "pretrained_model_name_or_path": TINY, "clip_l": TINY, "t5xxl": TINY, "ae": TINY, "network_dim": 4,
        "train_data_dir": str(named.parent), "output_dir": str(folder / "out"), "max_resolution": "64,64",
        "min_bucket_reso": 32, "max_bucket_reso": 96, "bucket_reso_steps": 16, "epoch": 1, "mixed_precision": "no",
        "flux1_cache_text_encoder_outputs": True, "additional_parameters": "--network_train_unet_only --seed 5",
        "sample_prompts": "", "sample_every_n_epochs": 0, "factor": 4,
    }  # fmt: skip
    (folder / "preset.json").write_text(json.dumps(preset), encoding="utf-8")
    return folder / "preset.json"


def job(folder: Path, pictures: Path) -> Path:
    content = yaml.safe_load((SAMPLES / "job.yaml").read_text(encoding="utf-8"))
    process = content["config"]["process"][0]
    process["training_folder"] = str(folder)
    content["config"]["name"] = "out"
    process["datasets"] = [
        {
            **process["datasets"][0],
            "folder_path": str(pictures),
            "resolution": [32, 64],
            "bucket_tolerance": 16,
        }
    ]
    process["model"] = {"name_or_path": TINY, "is_flux": True}
    process["train"] |= {"steps": 3, "dtype": "float32", "optimizer": "adamw"}
    process["save"] |= {"save_every": 2}
    process["sample"] |= {
        "sample_every": 3,
        "width": 64,
        "height": 64,
        "sample_steps": 1,
        "prompts": ["[trigger]"],
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return folder / "job.yaml"


def simpletuner(folder: Path, pictures: Path) -> Path:
    config = yaml.safe_load((SAMPLES / "simpletuner.json").read_text(encoding="utf-8"))
    backends = json.loads((SAMPLES / "backends.json").read_text(encoding="utf-8"))
    for backend in backends:
        if "instance_data_dir" in backend:
            backend |= {"instance_data_dir": str(pictures), "resolution": 64, "resolution_type": "pixel_area"}
    (folder / "backends.json").write_text(json.dumps(backends), encoding="utf-8")
    (folder / "lycoris.json").write_text(
        (SAMPLES / "lycoris.json").read_text(encoding="utf-8"), encoding="utf-8"
    )
    config |= {
        "--pretrained_model_name_or_path": TINY, "--output_dir": str(folder / "out"), "--max_train_steps": 3,
        "--checkpointing_steps": 2, "--validation_steps": 0, "--lr_warmup_steps": 1, "--mixed_precision": "bf16",
        "--user_prompt_library": "",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder / "config.json"


def replicate(folder: Path, pictures: Path) -> Path:
    inputs = json.loads((SAMPLES / "replicate.json").read_text(encoding="utf-8"))
    with zipfile.ZipFile(folder / "heron.zip", "w") as archive:
        for file in pictures.iterdir():
            archive.write(file, file.name)
    inputs |= {
        "input_images": str(folder / "heron.zip"), "resolution": "32,64", "steps": 3, "optimizer": "adamw",
        "layers_to_optimize_regex": "transformer.single_transformer_blocks.(1|7).proj_out",
    }  # fmt: skip
    (folder / "inputs.json").write_text(json.dumps(inputs), encoding="utf-8")
    return folder / "inputs.json"


def test_a_preset_of_the_gui_trains(tmp_path: Path, pictures: Path) -> None:
    assert main(["--config_file", str(gui(tmp_path, pictures)), *MODELS]) == 0
    names, metadata = loras(tmp_path / "out" / "heron.safetensors")
    assert len(names) > 10
    assert metadata["ss_optimizer"].startswith("prodigyopt")
    assert json.loads(metadata["ss_network_args"])["algo"] == "lokr"


def test_a_job_of_ai_toolkit_trains_and_goes_on(tmp_path: Path, pictures: Path) -> None:
    words = ["--config_file", str(job(tmp_path, pictures)), *MODELS]
    assert main(words) == 0
    names, metadata = loras(tmp_path / "out" / "out.safetensors")
    assert names == {"lora_unet_single_blocks_0_linear2", "lora_unet_single_blocks_1_linear2"}
    assert [one["resolution"] for one in json.loads(metadata["ss_datasets"])] == [[32, 32], [64, 64]]
    assert (tmp_path / "out" / "out-step00000002.safetensors").is_file()
    assert list((tmp_path / "out" / "sample").glob("*.png"))
    assert main([*words, "--max_train_steps", "4"]) == 0
    assert loras(tmp_path / "out" / "out.safetensors")[1]["ss_steps"] == "4"


def test_a_config_of_simpletuner_trains(tmp_path: Path, pictures: Path) -> None:
    assert main(["--config_file", str(simpletuner(tmp_path, pictures)), *MODELS]) == 0
    names, metadata = loras(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert "lora_unet_double_blocks_0_img_attn_qkv" in names
    assert "lora_unet_double_blocks_0_txt_mlp_2" in names
    assert not [name for name in names if "mod" in name or name.endswith("linear2")]
    assert metadata["ss_lr_scheduler"] == "polynomial"
    assert "1001" in metadata["ss_datasets"]


def test_inputs_of_replicate_train(tmp_path: Path, pictures: Path) -> None:
    path = replicate(tmp_path, pictures)
    out = [
        "--pretrained_model_name_or_path",
        TINY,
        "--output_dir",
        str(tmp_path / "out"),
        "--mixed_precision",
        "no",
    ]
    assert main(["--config_file", str(path), *out, *MODELS]) == 0
    names, metadata = loras(tmp_path / "out" / "h3ron.safetensors")
    assert names == {"lora_unet_single_blocks_1_linear2"}
    assert metadata["ss_network_dim"] == "32"


def test_two_ranks_read_one_config_and_say_it_once(tmp_path: Path, pictures: Path) -> None:
    path = replicate(tmp_path, pictures)
    out = [
        "--pretrained_model_name_or_path",
        TINY,
        "--output_dir",
        str(tmp_path / "out"),
        "--mixed_precision",
        "no",
    ]
    done = run(path, *out, *MODELS, "--dry_run", processes=2)
    assert done.stdout.count("is read as a config of Replicate") == 1
    assert done.stdout.count("total steps") == 1
    assert len(list((tmp_path / "out" / "images").iterdir())) == 1
