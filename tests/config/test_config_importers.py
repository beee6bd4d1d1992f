"""Configs of other programs: what they become, that every key is accounted for, and what is refused."""

from __future__ import annotations

import importlib.util
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
import toml
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from library.config.archives import unpacked
from library.config.dataset_keys import KEYS as DATASET_KEYS
from library.config.datasets import resolve_datasets
from library.config.importers import (
    ai_toolkit,
    ai_toolkit_keys,
    ai_toolkit_server,
    kohya_gui,
    page,
    replicate,
    simpletuner_keys,
)
from library.config.importers.recognise import import_file
from library.config.importers.report import account, dataset_toml, options_toml
from library.config.importers.rules import ARGUMENT, DATASET, Imported, Table
from library.config.load import load_config
from library.config.notices import Notices
from library.config.train_config import OPTIONS
from library.errors import ConfigError
from tests.e2e.running import TINY, draw_pictures
from tools.import_config import main as import_main
from tools.write_migrating import PAGE

SAMPLES = Path(__file__).parents[1] / "data" / "config" / "importers"
FILES = ("gui.json", "job.yaml", "server.json", "simpletuner.json", "replicate.json")
TABLES: dict[str, Table] = {
    "gui": kohya_gui.KEYS,
    "job": {**ai_toolkit_keys.JOB, **ai_toolkit_keys.PROCESS},
    "sets": ai_toolkit_keys.SETS,
    "server": ai_toolkit_server.KEYS,
    "simpletuner": simpletuner_keys.KEYS,
    "backend": simpletuner_keys.BACKEND,
    "replicate": replicate.KEYS,
}
KNOWN_ARGUMENTS = {
    *kohya_gui.KEYS,
    *("algo", "preset", "constraint", "block_size", "target_regex", "exclude_regex"),
}


def sample(name: str) -> Imported:
    return import_file(SAMPLES / name)


def written(folder: Path, content: object, name: str = "config.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def read(options: Mapping[str, object]) -> dict[str, object]:
    """The values that options stand for."""
    return {name: OPTIONS[name].read(value, "here") for name, value in options.items()}


@pytest.mark.parametrize("name", FILES)
def test_a_sample_becomes_what_it_must(name: str) -> None:
    imported = sample(name)
    expected = json.loads((SAMPLES / f"{Path(name).stem}.expected.json").read_text(encoding="utf-8"))
    assert imported.options == expected["options"]
    assert imported.dataset == expected["dataset"]


@pytest.mark.parametrize("name", FILES)
def test_the_written_files_give_the_same_config(name: str, tmp_path: Path) -> None:
    imported = sample(name)
    options = toml.loads(options_toml(imported, name, dataset="data.toml"))
    assert options.pop("dataset_config") == "data.toml"
    assert read(options) == {k: v for k, v in read(imported.options).items() if k != "huggingface_token"}
    if imported.dataset is not None:
        assert toml.loads(dataset_toml(imported, name)) == imported.dataset


@pytest.mark.parametrize("table", TABLES)
def test_rules_lead_to_options_only(table: str) -> None:
    for key, rule in TABLES[table].items():
        for name in rule.to:
            if name.startswith(DATASET):
                assert name.removeprefix(DATASET) in {*DATASET_KEYS, "[[datasets]]"}, key
            elif name.startswith(ARGUMENT):
                assert name.removeprefix(ARGUMENT) in KNOWN_ARGUMENTS, key
            else:
                assert name in OPTIONS, key
        assert not rule.is_dropped or rule.note, f"{key} is dropped without a reason"


@pytest.mark.parametrize("name", FILES)
def test_every_key_is_accounted_for(name: str) -> None:
    content = yaml.safe_load((SAMPLES / name).read_text(encoding="utf-8"))
    keys = {"gui.json": content, "server.json": content.get("arguments"), "replicate.json": content}.get(name)
    if keys is None and name == "job.yaml":
        process = content["config"]["process"][0]
        keys = ai_toolkit._flat({key: value for key, value in process.items() if key != "datasets"})
    keys = {key.lstrip("-") for key in keys or content}
    noted = {note.key for note in sample(name).notes}
    assert keys <= noted
    assert all(note.to or note.text for note in sample(name).notes)
    report = account(sample(name))
    assert all(key in report for key in keys)
    assert "hf_secret" not in report


ANY_VALUE = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 4096), st.floats(), st.text(max_size=6), st.just("1e-4"),
    st.sampled_from(["none", "latest", "adamw8bit", "cosine", "sigmoid", "bf16", "lokr", "512,768", "instanceprompt"]),
    st.lists(st.one_of(st.integers(16, 1024), st.text(max_size=4)), max_size=3),
    st.dictionaries(st.text(max_size=4), st.integers(), max_size=2),
)  # fmt: skip


def some_of(table: Table) -> st.SearchStrategy[dict[str, object]]:
    """Any keys of a table with any values."""
    return st.dictionaries(st.sampled_from(sorted(table)), ANY_VALUE, max_size=12)


def job_of(process: dict[str, object], sets: dict[str, object]) -> dict[str, object]:
    """An ai-toolkit job of flat keys."""
    nested: dict[str, object] = {"datasets": [{"folder_path": "x", **sets}], "model": {"is_flux": True}}
    for key, value in process.items():
        *parents, last = key.split(".")
        table: object = nested
        for parent in parents:
            table = table.setdefault(parent, {}) if isinstance(table, dict) else {}
        if isinstance(table, dict) and last not in table:
            table[last] = value
    return {"config": {"name": "n", "process": [nested]}}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_values_become_options_or_a_sentence(data: st.DataObject, tmp_path: Path) -> None:
    kind = data.draw(st.sampled_from(["gui", "job", "server", "simpletuner", "replicate"]))
    if kind == "job":
        content = job_of(data.draw(some_of(TABLES["job"])), data.draw(some_of(TABLES["sets"])))
    elif kind == "simpletuner":
        backends = written(
            tmp_path, [{"instance_data_dir": "x", **data.draw(some_of(TABLES["backend"]))}], "b.json"
        )
        content = {**data.draw(some_of(TABLES[kind])), "model_family": "flux", "model_type": "lora"}
        content["data_backend_config"] = str(backends)
    else:
        signs = {"gui": {"flux1_checkbox": True}, "server": {"dataset_path": "x", "steps": 1}}
        content = {**data.draw(some_of(TABLES[kind])), **signs.get(kind, {"input_images": "x"})}
    path = written(tmp_path, content)
    try:
        imported = import_file(path)
    except ConfigError:
        return
    assert imported.options.keys() <= OPTIONS.keys()
    assert imported.origins.keys() == imported.options.keys()
    for table in (imported.dataset or {"datasets": []})["datasets"]:
        values = {**table, **{key: value for subset in table["subsets"] for key, value in subset.items()}}
        assert values.keys() <= DATASET_KEYS.keys() | {"subsets"}
    assert account(imported)
    try:
        text = options_toml(imported, "config.json")
    except ConfigError:
        return
    options = toml.loads(text)
    assert read(options) == read({name: imported.options[name] for name in options})


def test_a_preset_of_the_gui_runs_under_the_names_of_options(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "data" / "1_x", [(64, 64)]).parent
    words = ["--config_file", str(SAMPLES / "gui.json"), "--train_data_dir", str(pictures), "--seed", "3"]
    loaded = load_config(words)
    assert loaded.sources["optimizer_type"] == "gui.json optimizer"
    assert loaded.sources["seed"] == "command line"
    assert loaded.config.network.network_args == ("algo=lokr", "preset=full", "conv_dim=10000", "factor=12")
    said = "\n".join(loaded.notices)
    assert "gui.json is read as a config of kohya_ss GUI" in said
    assert "; epoch -> max_train_epochs; " in said
    assert "dropped multi_gpu, num_processes (it belongs to accelerate launch; give it there)" in said
    assert "max_grad_norm stays at 1.0" in said
    with pytest.raises(ConfigError, match="strict_config"):
        load_config([*words, "--strict_config"])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("replicate.json", {"input_images": "IMAGES", "hf_token": "hf_abc", "wandb_api_key": "key_abc"}),
        ("gui.json", {"LoRA_type": "Flux1", "flux1_checkbox": True, "huggingface_token": "hf_abc",
                      "wandb_api_key": "key_abc", "network_module": "networks.lora_flux"}),
    ],
)  # fmt: skip
def test_secrets_of_a_config_are_told_nowhere(name: str, content: dict[str, object], tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "data" / "1_x", [(64, 64)])
    filled = {key: str(pictures) if value == "IMAGES" else value for key, value in content.items()}
    path = written(tmp_path, filled, name)
    words = ["--config_file", str(path), "--pretrained_model_name_or_path", TINY, "--log_with", "tensorboard"]
    loaded = load_config([*words, "--logging_dir", str(tmp_path), "--output_dir", str(tmp_path),
                          "--train_data_dir", str(pictures.parent)])  # fmt: skip
    assert loaded.config.saving.huggingface_token == "hf_abc"
    assert "abc" not in "\n".join(loaded.notices) + account(import_file(path)) + options_toml(
        import_file(path), name
    )


def test_fields_of_the_gui_for_flux_lora(tmp_path: Path) -> None:
    preset = {
        "LoRA_type": "Flux1", "flux1_checkbox": True, "split_qkv": True, "split_mode": True, "optimizer": "CAME",
        "train_blocks": "single", "train_lora_ggpo": True, "ggpo_beta": 0.01, "ggpo_sigma": 0.03, "conv_dim": 4,
        "train_single_block_indices": "7,20", "train_double_block_indices": "all", "in_dims": "1,1,1,1,1",
        "text_encoder_lr": 0, "unet_lr": 1e-4, "lr_scheduler": "constant", "lr_warmup_steps": 100, "max_train_steps": 9,
        "epoch": 3, "additional_parameters": "--not_an_option 3", "network_args": 'verbose=True "rank_dropout=0.1"',
    }  # fmt: skip
    imported = import_file(written(tmp_path, preset))
    assert set(imported.options["network_args"]) == {
        "split_qkv=True", "train_single_block_indices=7,20", "in_dims=1,1,1,1,1", "ggpo_beta=0.01", "ggpo_sigma=0.03",
        "train_blocks=single", "verbose=True", "rank_dropout=0.1",
    }  # fmt: skip
    assert imported.options["network_train_unet_only"] is True
    assert imported.options["max_train_steps"] == 9
    dropped = {note.key: note.text for note in imported.notes if not note.to and not note.is_off}
    assert {"conv_dim", "epoch", "lr_warmup_steps", "additional_parameters"} <= dropped.keys()
    # CAME stays where its package is installed.
    is_there = importlib.util.find_spec("pytorch_optimizer") is not None
    assert imported.options.get("optimizer_type") == ("CAME" if is_there else None)
    assert is_there or "pytorch-optimizer" in dropped["optimizer"]


@pytest.mark.parametrize(
    ("kind", "module", "arguments"),
    [
        ("Flux1 OFT", "networks.oft_flux", ["enable_all_linear=True"]),
        ("Standard", "networks.lora_flux", None),
        ("LyCORIS/LoCon", "lycoris.kohya", ["algo=locon"]),
        ("LyCORIS/Diag-OFT", "lycoris.kohya", ["algo=diag-oft", "constraint=0.1"]),
        ("LyCORIS/iA3", "lycoris.kohya", ["algo=ia3", "train_on_input=True"]),
    ],
)
def test_lora_types_of_the_gui(kind: str, module: str, arguments: list[str] | None, tmp_path: Path) -> None:
    fields = {"enable_all_linear": True, "constrain": 0.1, "train_on_input": True, "factor": -1}
    imported = import_file(written(tmp_path, {"flux1_checkbox": True, "LoRA_type": kind, **fields}))
    assert imported.options["network_module"] == module
    assert imported.options.get("network_args") == arguments


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"flux_lora_target": "tiny"}, {"network_args": [r"target_regex=single_transformer_blocks\.(7|20)\.proj_out"]}),
        ({"flux_lora_target": "ai-toolkit", "lora_rank": 8}, {"network_alpha": 8, "network_args": None}),
        ({"flow_schedule_auto_shift": True}, {"timestep_sampling": "flux_shift"}),
        ({"flux_schedule_shift": 0}, {"timestep_sampling": "sigmoid", "discrete_flow_shift": None}),
        ({"flow_schedule_shift": 1.5}, {"timestep_sampling": "shift", "discrete_flow_shift": 1.5}),
        ({"num_train_epochs": 3, "max_train_steps": 0}, {"max_train_epochs": 3, "max_train_steps": None}),
        ({"lr_scheduler": "sine", "lr_warmup_steps": 7}, {"lr_scheduler": "cosine", "lr_warmup_steps": 7}),
        ({"lr_scheduler": "constant", "lr_warmup_steps": 7}, {"lr_warmup_steps": None}),
        ({"base_model_precision": "no_change"}, {"fp8_base": None}),
        ({"optimizer": "bnb-lion8bit"}, {"optimizer_type": "Lion8bit"}),
        ({"use_ema": True, "ema_decay": 0.9, "ema_device": "cpu"}, {"ema_decay": 0.9, "ema_on_cpu": True}),
        ({"use_ema": "true"}, {"ema_decay": 0.995, "ema_for_samples": True, "ema_on_cpu": None}),
        ({"use_ema": False, "ema_decay": 0.9}, {"ema_decay": None, "ema_for_samples": None}),
    ],
)  # fmt: skip
def test_keys_of_simpletuner(changes: dict[str, object], options: dict[str, object], tmp_path: Path) -> None:
    base = {
        "model_family": "flux",
        "model_type": "lora",
        "data_backend_config": str(SAMPLES / "backends.json"),
    }
    imported = import_file(written(tmp_path, {**base, **changes}))
    assert {name: imported.options.get(name) for name in options} == options


@pytest.mark.parametrize(("alignment", "step"), [(0, 64), (0.5, 16), ("32", 32)])
def test_buckets_of_simpletuner_have_a_step(alignment: object, step: int, tmp_path: Path) -> None:
    content = {"model_family": "flux", "model_type": "lora", "aspect_bucket_alignment": alignment,
               "data_backend_config": str(SAMPLES / "backends.json")}  # fmt: skip
    imported = import_file(written(tmp_path, content))
    assert imported.dataset is not None
    assert {table.get("bucket_reso_steps", step) for table in imported.dataset["datasets"]} == {step}


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({"network": {"type": "lokr", "lokr_factor": 8}},
         {"network_module": "lycoris.kohya", "network_dim": 100_000, "network_args": ["factor=8", "algo=lokr"]}),
        ({"network": {"type": "lokr", "lokr_full_rank": False, "linear": 4}}, {"network_dim": 4}),
        ({"train": {"linear_timesteps": True}}, {"timestep_sampling": "uniform"}),
        ({"train": {"content_or_style": "style"}}, {"timestep_sampling": "sigmoid"}),
        ({"train": {"train_text_encoder": True, "text_encoder_lr": 1e-5}},
         {"network_train_unet_only": False, "text_encoder_lr": [1e-5], "cache_text_encoder_outputs": None}),
        ({"sample": {"prompts": ["x"], "sample_every": 5}, "train": {"disable_sampling": True}},
         {"sample_prompts": None, "sample_every_n_steps": None}),
        ({"datasets": [{"folder_path": "x", "shuffle_tokens": True, "mask_path": "m"}]},
         {"cache_text_encoder_outputs": True, "masked_loss": True}),
        ({"datasets": [{"folder_path": "x", "random_crop": True}]}, {"cache_latents": None}),
    ],
)  # fmt: skip
def test_keys_of_ai_toolkit(changes: dict[str, object], options: dict[str, object], tmp_path: Path) -> None:
    process = {
        "type": "sd_trainer",
        "model": {"name_or_path": "flux", "is_flux": True},
        "datasets": [],
        **changes,
    }
    imported = import_file(
        written(tmp_path, {"job": "extension", "config": {"name": "n", "process": [process]}})
    )
    assert {name: imported.options.get(name) for name in options} == options


def test_uploads_and_trackers_count_as_far_as_this_version_has_them(tmp_path: Path) -> None:
    inputs = {
        "input_images": "x",
        "wandb_api_key": "secret",
        "wandb_sample_prompts": "a\nb",
        "hf_repo_id": "me/it",
    }
    imported = import_file(written(tmp_path, inputs))
    # A preset runs on a machine without wandb too; a config that says wandb itself is refused there.
    tracker = "wandb" if importlib.util.find_spec("wandb") else "tensorboard"
    assert imported.options["log_with"] == tracker
    assert ("pip install wandb" in account(imported)) == (tracker == "tensorboard")
    assert imported.options["huggingface_repo_id"] == "me/it"
    assert str(imported.options["sample_prompts"]).count("\n") == 1
    assert "secret" not in account(imported)
    assert "secret" not in options_toml(imported, "config.json")


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ({"flux1_checkbox": False, "model_list": "sd15", "LoRA_type": "Standard"}, "for another model than FLUX.1"),
        ({"flux1_checkbox": True, "LoRA_type": "LoRA-FA"}, "LoRA_type LoRA-FA is not available"),
        ({"config": {"process": [{"type": "sd_trainer", "model": {"is_xl": True}}]}}, "than FLUX.1 .is_xl"),
        ({"config": {"process": [{"type": "sd_trainer", "model": {"arch": "wan21"}}]}}, "arch wan21"),
        ({"config": {"process": [{"type": "extract"}]}}, "which trains no LoRA"),
        ({"config": {"process": []}}, "config.process is empty"),
        ({"config": {"process": [{"model": {"is_flux": True}, "datasets": [{}]}]}}, "no folder_path"),
        ({"config": {"process": [{"model": {"is_flux": True}, "train": 3, "datasets": [7]}]}}, "entry 1 is not"),
        ({"model_family": "sdxl", "model_type": "lora"}, "trains LoRAs of FLUX.1"),
        ({"model_family": "flux", "model_type": "full"}, "trains LoRAs of FLUX.1"),
        ({"model_family": "flux", "model_type": "lora"}, "data_backend_config is missing"),
        ({"data_backend_config": "none.json"}, "none.json: there is no such file"),
        ({"data_backend_config": "x", "lora_type": "lycoris"}, "needs lycoris_config"),
        ({"input_images": "https://example.com/x.zip"}, "is an address"),
        ({"input_images": "x", "resolution": "large"}, "'large' is not a number"),
        ({"dataset_path": "", "model_name": "x"}, "dataset_path is missing"),
        ({"compute_environment": "LOCAL_MACHINE"}, "accelerate launch --config_file"),
        ({"datasets": []}, "a dataset file; name it as dataset_config"),
        ({"training_method": "LORA", "concepts": []}, "a preset of OneTrainer"),
        ({"3": {"class_type": "KSampler"}}, "a workflow of ComfyUI"),
        ({"algo": "lokr", "linear_dim": 4}, "give the config.json that names it"),
        ([{"id": "a", "instance_data_dir": "b"}], "SimpleTuner's list of datasets"),
        ({"something": 1}, "none of the configs that can be read"),
        ([], "none of the configs that can be read"),
    ],
)  # fmt: skip
def test_what_cannot_be_read_is_said_in_a_sentence(content: object, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=sentence) as caught:
        load_config(["--config_file", str(written(tmp_path, content))])
    assert "config.json" in str(caught.value) or "none.json" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("x.json", '{"a": 1', "x.json line 1, column 8: this is not JSON"),
        ("x.json", "", "this is not JSON"),
        ("x.yaml", "a: [1", "x.yaml line 1, column .*: this is not YAML"),
        ("x.yaml", "a: b: c", "line 1"),
        ("x.yaml", "only words", "none of the configs"),
    ],
)
def test_broken_files_are_named_with_their_place(name: str, text: str, sentence: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=sentence):
        import_file(tmp_path / name)


def test_a_name_without_ending_is_toml_first(tmp_path: Path) -> None:
    (tmp_path / "train").write_text((SAMPLES / "server.json").read_text(encoding="utf-8"), encoding="utf-8")
    words = ["--config_file", str(tmp_path / "train")]
    assert load_config(words).config.training.max_train_steps == 2000
    (tmp_path / "train.toml").write_text("max_train_steps = 7\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="network_module is missing"):
        load_config(words)


def test_datasets_stay_in_memory_and_yield_to_the_command_line(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", [(64, 64), (96, 64)])
    config = {
        "name": "n", "dataset_path": str(pictures), "model_name": TINY, "steps": 1, "resolution": "64,128",
    }  # fmt: skip
    path = written(tmp_path, config)
    before = sorted(tmp_path.rglob("*"))
    loaded = load_config(["--config_file", str(path)])
    datasets = resolve_datasets(loaded.config)
    assert [dataset.resolution for dataset in datasets] == [(64, 64), (128, 128)]
    assert {subset.image_dir for dataset in datasets for subset in dataset.subsets} == {pictures}
    assert sorted(tmp_path.rglob("*")) == before

    loaded = load_config(["--config_file", str(path), "--train_data_dir", str(tmp_path)])
    assert loaded.config.dataset_tables is None
    assert any("--train_data_dir names the data" in notice for notice in loaded.notices)


def test_a_zip_file_stands_for_its_folder(tmp_path: Path) -> None:
    pictures = draw_pictures(tmp_path / "pictures", [(64, 64), (96, 64)])
    archive = tmp_path / "birds.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for file in pictures.iterdir():
            opened.write(file, f"birds/{file.name}")
            opened.writestr(f"__MACOSX/birds/._{file.name}", b"")
    inputs = {"input_images": str(archive), "trigger_word": "h3ron", "resolution": "64"}
    words = ["--config_file", str(written(tmp_path, inputs)), "--output_dir", str(tmp_path / "out")]
    config = load_config([*words, "--pretrained_model_name_or_path", TINY]).config
    notices = Notices()
    (dataset,) = resolve_datasets(config, notices=notices)
    folder = dataset.subsets[0].image_dir
    assert folder is not None
    assert folder.parent == tmp_path / "out" / "images"
    assert {file.name for file in folder.iterdir()} == {file.name for file in pictures.iterdir()}
    again = folder.stat().st_mtime_ns
    assert resolve_datasets(config)[0].subsets[0].image_dir == folder
    assert folder.stat().st_mtime_ns == again

    with zipfile.ZipFile(archive, "a") as opened:
        opened.writestr("other/picture0.png", b"")
    with pytest.raises(ConfigError, match="two files named picture0"):
        unpacked(archive, tmp_path)
    archive.write_bytes(b"no archive")
    with pytest.raises(ConfigError, match="cannot be unpacked"):
        unpacked(archive, tmp_path)


def test_the_command_writes_what_can_be_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert import_main([str(SAMPLES / "job.yaml"), "-o", "train.toml"]) == 0
    assert "wrote train.toml, train_data.toml" in capsys.readouterr().out
    config = load_config(["--config_file", "train.toml", "--output_dir", "elsewhere"]).config
    assert config.dataset.dataset_config == Path("train_data.toml")
    assert config.training.max_train_steps == 4000
    assert import_main([str(SAMPLES / "job.yaml"), "-o", "train.toml"]) == 2
    assert "train.toml exists" in capsys.readouterr().err

    assert import_main([str(SAMPLES / "replicate.json")]) == 0
    out = capsys.readouterr()
    assert re.search(r"^max_train_steps = 1040  # steps$", out.out, re.MULTILINE)
    assert "[[datasets.subsets]]" in out.out
    assert "dropped:" in out.err


def test_the_page_has_the_tables_of_the_rules() -> None:
    text = PAGE.read_text(encoding="utf-8")
    assert page.with_tables(text) == text, "run python -m tools.write_migrating"
