"""Files that users published: each resolves as they meant it, or is refused in one sentence that says why."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import flux_train_network
from library.config.cli import parse
from library.config.datasets import resolve_datasets
from library.config.load import load_config
from library.config.loaded import LoadedConfig
from library.config.notices import Notices
from library.config.options import UNSET
from library.config.prompts import load_prompts
from library.config.train_config import OPTIONS, TrainConfig
from library.errors import ConfigError, DatasetError
from library.models.flux import Flux
from library.models.params import FluxParams
from library.optim import factory
from library.optim.plugins import parse_arguments
from library.train.build import check_parts
from networks.interface import create
from tests.config.wild_files import MODELS, TINY, WILD, script_words, with_paths, without_options

FILLED = {"pretrained_model_name_or_path": TINY, "clip_l": TINY, "t5xxl": TINY, "ae": TINY}


class Desk:
    """A folder with stand-ins: images, prompts, and the wild files rewritten to name them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "img"
        self.draw(self.images / "10_thing")
        self.prompts = folder / "prompts.txt"
        self.prompts.write_text("a thing --w 64 --h 64 --s 2\n")
        self.dataset = folder / "dataset.toml"
        self.dataset.write_text(
            f"[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = '{self.images / '10_thing'}'\n"
        )

    @staticmethod
    def draw(folder: Path, number: int = 2) -> Path:
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(number):
            Image.new("RGB", (1024, 1024 - 64 * index), (40 * index, 90, 160)).save(folder / f"{index}.png")
            (folder / f"{index}.txt").write_text(f"thing, number {index}")
        return folder

    def stand_in(self, key: str, value: str) -> str | None:
        if key in MODELS:
            return TINY
        if key == "sample_prompts":
            return (
                str(self.prompts.with_suffix(Path(value).suffix))
                if value.endswith(".toml")
                else str(self.prompts)
            )
        if key in ("output_dir", "logging_dir"):
            return str(self.folder / key)
        if key in ("image_dir", "conditioning_data_dir"):
            return str(self.draw(self.folder / key / value.strip("./\\").replace("\\", "/").split("/")[-1]))
        if key == "metadata_file":
            path = self.folder / Path(value).name
            path.write_text("{}")
            return str(path)
        return {"train_data_dir": str(self.images), "dataset_config": str(self.dataset)}.get(key)

    def file(self, name: str) -> Path:
        """The wild file, rewritten; line ends and byte order mark stay."""
        text = (WILD / name).read_bytes().decode("utf-8")
        path = self.folder / Path(name).name
        path.write_bytes(with_paths(text, self.stand_in).encode("utf-8"))
        return path

    def load(self, name: str, **fill: object) -> LoadedConfig:
        """The train file, with values for what it leaves blank given on the command line."""
        words = [word for key, value in fill.items() for word in (f"--{key}", str(value)) if word]
        return load_config(["--config_file", str(self.file(f"train/{name}.toml")), *words])


@pytest.fixture
def desk(tmp_path):
    return Desk(tmp_path)


def said(loaded: LoadedConfig, *parts: str) -> bool:
    return any(all(part in notice for part in parts) for notice in loaded.notices)


def values(loaded: LoadedConfig, *names: str) -> tuple[object, ...]:
    return tuple(loaded.config.value(name) for name in names)


def dry_run(path: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert flux_train_network.main(["--config_file", str(path), "--dry_run", *words]) == 0, (
        capsys.readouterr()
    )
    return capsys.readouterr().out


def test_sections_and_comments_in_chinese_with_dataset_and_prompts(desk, capsys):
    name = "cursoragent_sections_blocks_to_swap"
    loaded = desk.load(name, dataset_config=desk.dataset)
    assert values(loaded, "network_dim", "fp8_base", "gradient_accumulation_steps", "lr_warmup_steps") == (
        16, True, 4, 100,
    )  # fmt: skip
    assert values(loaded, "learning_rate", "cache_text_encoder_outputs", "xformers") == (8e-5, True, False)
    desk.prompts.write_bytes((WILD / "prompts/cursoragent_comments_blank_lines.txt").read_bytes())
    printed = dry_run(
        desk.file(f"train/{name}.toml"), capsys, "--blocks_to_swap", "0", "--dataset_config",
        str(desk.file("dataset/cursoragent_flux1.toml")),
    )  # fmt: skip
    assert re.search("images +2 used, 16 an epoch with repeats", printed)


def test_batch_size_is_train_batch_size(desk, capsys):
    loaded = desk.load("persona_generator_partial")
    assert loaded.config.dataset.train_batch_size == 1
    assert loaded.sources["train_batch_size"].startswith("persona_generator_partial.toml [training] line")
    assert said(loaded, "batch_size is taken as train_batch_size; Kohya's trainer ignores it")
    printed = dry_run(desk.folder / "persona_generator_partial.toml", capsys)
    assert re.search("total steps +200\n", printed)


def test_it_trains(desk, capsys):
    (desk.images / "10_thing").rename(desk.images / "2_thing")
    for path in desk.images.rglob("*.png"):
        Image.new("RGB", (64, 64), (40, 90, 160)).save(path)
    config = desk.file("train/persona_generator_partial.toml")
    words = [
        "--resolution",
        "64",
        "--network_dim",
        "2",
        "--max_train_epochs",
        "1",
        "--max_data_loader_n_workers",
        "0",
    ]
    words += ["--caption_extension", ".txt", "--optimizer_type", "AdamW", "--tokenizer_cache_dir", TINY]
    assert flux_train_network.main(["--config_file", str(config), *words]) == 0, capsys.readouterr()
    saved = desk.folder / "output_dir/persona_flux_lora.safetensors"
    with safe_open(saved, "pt") as file:
        assert file.metadata()["ss_steps"] == "4"
        assert file.get_tensor("lora_unet_single_blocks_0_linear1.lora_up.weight").abs().sum() > 0


def test_trailing_commas_are_no_tuples(desk, capsys):
    loaded = desk.load("fmsunyh_13k_adafactor_trailing_commas")
    assert values(loaded, "max_train_epochs", "text_encoder_lr", "resolution", "xformers") == (
        10, (1e-5, 1e-5), (1024, 1024), True,
    )  # fmt: skip
    assert said(loaded, "Keys without effect", "epoch (max_train_epochs is given)", "noise_offset_type (FLUX")
    assert said(loaded, "decides the length, so ignored: max_train_steps = 1000000000")
    arguments = parse_arguments(loaded.config.optimizer.optimizer_args, option="optimizer_args").values
    assert arguments == {
        "relative_step": False, "scale_parameter": False, "warmup_init": False, "weight_decay": 0.01,
    }  # fmt: skip
    assert any(
        "relative_step=False,: the comma at the end is ignored" in one for one in check_parts(loaded.config)
    )
    dry_run(desk.folder / "fmsunyh_13k_adafactor_trailing_commas.toml", capsys)


def test_a_later_section_overrides_and_says_so(desk):
    name = "jordansky_sections_inference_override"
    refusal = ""
    try:
        desk.load(name, train_data_dir=desk.images)
    except ConfigError as error:  # Kohya refuses these two together
        refusal = str(error)
    assert not refusal or {"blocks_to_swap", "cpu_offload_checkpointing"} <= set(re.findall(r"\w+", refusal))
    text = (WILD / f"train/{name}.toml").read_text().replace("cpu_offload_checkpointing = true\n", "")
    path = desk.folder / f"{name}.toml"
    path.write_text(with_paths(text, desk.stand_in))
    loaded = load_config(["--config_file", str(path), "--train_data_dir", str(desk.images)])
    assert values(loaded, "guidance_scale", "resolution", "text_encoder_lr", "seed") == (
        3.5, (1024, 1024), (5e-5,), 42,
    )  # fmt: skip
    assert said(
        loaded, f"guidance_scale is given twice: 1.0 ({name}.toml [model_arguments] line 8), then 3.5 "
        f"({name}.toml [inference] line"
    )  # fmt: skip
    assert said(loaded, "resolution is given twice: 1024 (", "then '1024,1024' (")
    assert said(loaded, "steps, denoise (sample_prompts say it")
    check_parts(loaded.config)


def test_blanks_numbers_for_flags_and_keys_of_other_families(desk):
    loaded = desk.load("hinablue_example_flux_lokr", **FILLED)
    assert values(
        loaded,
        "log_with",
        "reg_data_dir",
        "vae",
        "persistent_data_loader_workers",
        "max_grad_norm",
    ) == (None, None, None, True, 0.0)
    assert not loaded.config.memory.blocks_to_swap
    assert said(loaded, "clip_g, gemma2 (it belongs to another model family)", "noise_offset_type")
    assert loaded.config.network.network_args[-2:] == ("algo=lokr", "train_norm=False")
    with pytest.raises(ConfigError) as caught:
        check_parts(loaded.config)
    message = str(caught.value)
    assert message.startswith("optimizer_type = Automagic_Sinkgd is not known; did you mean ")
    assert all(name in message for name in ("known are", "AdamW8bit", "Prodigy", "Adafactor", "CAME"))
    # Blocks of both kinds, as flux_train.py counted them in 2024, are added up.
    text = (
        (WILD / "train/hinablue_example_flux_lokr.toml").read_text().replace("\nblocks_to_swap = 0\n", "\n")
    )
    text = text.replace("double_blocks_to_swap = 0", "double_blocks_to_swap = 4")
    text = text.replace("single_blocks_to_swap = 0", "single_blocks_to_swap = 9")
    path = desk.folder / "swap.toml"
    path.write_text(with_paths(text, desk.stand_in))
    words = [word for key, value in FILLED.items() for word in (f"--{key}", value)]
    loaded = load_config(["--config_file", str(path), *words])
    assert said(
        loaded,
        "double_blocks_to_swap = 4 and single_blocks_to_swap = 9, an old form, is taken as blocks_to_swap = 9",
    )
    assert loaded.config.memory.blocks_to_swap == 9


def test_blank_lists_are_empty_and_num_repeats_needs_a_place(desk, capsys):
    desk.prompts.with_suffix(".toml").write_text(
        '[prompt]\nwidth = 64\n[[prompt.subset]]\nprompt = "a thing"\n'
    )
    name = "hiusdev_colab_config_flux"
    loaded = desk.load(name, train_data_dir=desk.images)
    assert values(loaded, "optimizer_args", "network_args", "resume", "text_encoder_lr", "save_state") == (
        (), (), None, (1e-5,), False,
    )  # fmt: skip
    assert said(loaded, "num_repeats (the names of the folders, N_name, say it)", "num_prompts (")
    assert load_prompts(loaded.config.sampling.sample_prompts).prompts[0].width == 64
    assert "20 an epoch with repeats" in dry_run(
        desk.folder / f"{name}.toml", capsys, "--train_data_dir", str(desk.images), "--resolution", "1024"
    )
    loaded = desk.load(name, dataset_config=desk.dataset)
    assert said(loaded, "num_repeats is taken as dataset_repeats")
    (dataset,) = resolve_datasets(loaded.config)
    assert dataset.subsets[0].num_repeats == 10


def test_fp16_with_inductor_and_t5(desk, capsys):
    loaded = desk.load("heredoc_fp16_inductor_t5", train_data_dir=desk.images)
    assert values(
        loaded, "mixed_precision", "torch_compile", "dynamo_backend", "text_encoder_lr", "sample_prompts"
    ) == ("fp16", True, "inductor", (1e-6, 1e-6), None)
    assert loaded.sources["torch_compile"] == "implied by dynamo_backend"
    assert said(loaded, "dynamo_backend", "turns torch_compile on")
    assert "train_t5xxl=True" in loaded.config.network.network_args
    printed = dry_run(
        desk.folder / "heredoc_fp16_inductor_t5.toml", capsys, "--train_data_dir", str(desk.images)
    )
    assert re.search("parameters +[0-9,]+ trained", printed)


def test_invented_keys_prodigyopt_and_a_list_of_prompts(desk, capsys):
    loaded = desk.load("sidney_rtx5090_native")
    ignored = (
        "enable_cudnn_benchmark",
        "cudnn_deterministic",
        "use_tensorcore",
        "tf32_mode",
        "log_every_n_steps",
    )
    assert said(
        loaded, "Keys without effect here: ", *ignored, "cache_info_to_disk (it is no option; cache_info"
    )
    assert said(loaded, "dataloader_num_workers is taken as max_data_loader_n_workers")
    prompts = load_prompts(loaded.config.sampling.sample_prompts)
    assert [one.prompt[:12] for one in prompts.prompts] == ["t4r4woman po", "t4r4woman sm", "t4r4woman cl"]
    assert {(one.width, one.seed, one.scale) for one in prompts.prompts} == {(1024, 1, 3.5)}
    assert len(prompts.notices) == 3
    notices = check_parts(loaded.config)
    assert "optimizer_type = prodigyopt is read as Prodigy" in notices
    arguments = parse_arguments(loaded.config.optimizer.optimizer_args, option="optimizer_args").values
    assert arguments["betas"] == (0.9, 0.999)
    dry_run(desk.folder / "sidney_rtx5090_native.toml", capsys)


def test_another_family_s_module_and_a_folder_without_repeats(desk):
    with pytest.raises(ConfigError) as caught:
        desk.load("autogen_wrong_network_module")
    assert str(caught.value) == (
        "network_module = 'networks.lora' (autogen_wrong_network_module.toml [network] line "
        "42) is the module for Stable Diffusion; FLUX's is networks.lora_flux"
    )
    loaded = desk.load(
        "autogen_wrong_network_module", network_module="networks.lora_flux",
        train_data_dir=desk.draw(desk.folder / "flat"),
    )  # fmt: skip
    assert said(loaded, "v_pred (it belongs to another model family)")
    with pytest.raises(DatasetError, match=r"holds 2 images itself: move them into a sub-folder .*10_name"):
        resolve_datasets(loaded.config)


def test_yaml_is_not_toml(desk):
    with pytest.raises(ConfigError) as caught:
        desk.load("neg_phoenix_yaml_in_toml")
    assert str(caught.value) == (
        f"{desk.folder / 'neg_phoenix_yaml_in_toml.toml'} line 2, column 3: this is not TOML (Expected '=' after a "
        "key in a key/value pair); write key = value, the colon is YAML's or JSON's"
    )


def resolve(desk: Desk, name: str, **options: object):
    config = TrainConfig.from_values({"dataset_config": desk.file(f"dataset/{name}.toml"), **options})
    notices = Notices()
    return resolve_datasets(config, notices=notices), notices


@pytest.mark.parametrize(
    ("name", "resolutions", "repeats"),
    [
        ("kohya_lora_tool_bom", [1024], [5]),
        ("eden_multires_caption_prefix", [512, 768, 1024], [1, 1, 1]),
        ("sdscripts_docs_wildcard_prefix_suffix", [1024], [1]),
        ("offlive_reg_images", [512], [30, 1]),
        ("cursoragent_flux1", [1024], [8]),
        ("davidas_finetune_two_metadata", [768], [1, 1]),
    ],
)
def test_dataset_files(desk, name, resolutions, repeats):
    datasets, notices = resolve(desk, name)
    assert [dataset.resolution[0] for dataset in datasets] == resolutions
    assert [subset.num_repeats for dataset in datasets for subset in dataset.subsets] == repeats
    assert notices.remarks == []


def test_what_the_dataset_files_say(desk):
    (dataset,), _ = resolve(desk, "sdscripts_docs_wildcard_prefix_suffix")
    (subset,) = dataset.subsets
    assert (subset.keep_tokens_separator, subset.secondary_separator, subset.enable_wildcard) == (
        "|||",
        ";;;",
        True,
    )
    assert subset.caption_prefix == "1girl, hatsune miku, vocaloid |||"
    (dataset,), _ = resolve(desk, "offlive_reg_images")
    assert [(one.is_reg, one.class_tokens) for one in dataset.subsets] == [
        (False, "miadaki man"),
        (True, "man"),
    ]
    (dataset,), _ = resolve(desk, "davidas_finetune_two_metadata")
    assert all(
        one.metadata_file and one.flip_aug and one.caption_tag_dropout_rate == 0.5 for one in dataset.subsets
    )


def test_masks_need_masked_loss(desk):
    (dataset,), _ = resolve(desk, "kohya_ss_test_dataset_masked_loss", masked_loss=True)
    assert dataset.subsets[0].conditioning_data_dir.name == "masked_loss"
    with pytest.raises(
        ConfigError, match=r"conditioning_data_dir needs --masked_loss: set masked_loss, or remove"
    ):
        resolve(desk, "kohya_ss_test_dataset_masked_loss")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        (
            "kingosx_sofia_typo_bucket_resolution",
            "kingosx_sofia_typo_bucket_resolution.toml [general] (line 10): unknown key 'min_bucket_resolution'; "
            "did you mean 'min_bucket_reso'?",
        ),
        (
            "neg_musubi_image_directory",
            "neg_musubi_image_directory.toml [[datasets]] 1 (line 9): image_directory belongs to musubi-tuner's "
            "dataset files; here it is image_dir in [[datasets.subsets]]",
        ),
    ],
)
def test_dataset_files_that_are_refused(desk, name, sentence):
    with pytest.raises(ConfigError) as caught:
        resolve(desk, name)
    assert str(caught.value) == sentence


def command_words(desk: Desk, name: str) -> list[str]:
    """The words of a command line, paths replaced."""
    words = script_words((WILD / f"cli/{name}.txt").read_text())
    for index, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if word.startswith("--") and equals and value:
            new = desk.stand_in(flag[2:], value) if flag != "--sample_prompts" else None
            words[index] = word if new is None else f"{flag}={new}"
        elif not word.startswith("--") and index and words[index - 1].startswith("--"):
            new = desk.stand_in(words[index - 1][2:], word)
            words[index] = new or word
    return words


COMMANDS = sorted(path.stem for path in (WILD / "cli").iterdir())


@pytest.mark.parametrize("name", COMMANDS)
def test_command_lines_parse(desk, name):
    given = parse(command_words(desk, name), Notices())
    assert len(given) > 5
    assert all(OPTIONS[option].read(item.raw, item.place) is not None for option, item in given.items())
    if name.startswith("issue1475"):
        assert given["wandb_api_key"].raw == ""
        assert OPTIONS["wandb_api_key"].read("", "command line") is UNSET
        assert OPTIONS["zero_stage"].read(given["zero_stage"].raw, "command line") == 2


def test_repeated_network_args_keep_the_last(desk):
    loaded = load_config(command_words(desk, "fmsunyh_repeated_network_args"))
    assert loaded.config.network.network_args == ("train_single_block_indices=all",)
    assert said(
        loaded, "--network_args is given several times; the last counts, not train_double_block_indices=all"
    )
    assert values(loaded, "lr_warmup_steps", "lr_decay_steps", "caption_extension") == (0.1, 0.5, ".txt")
    factory.check(loaded.config.optimizer)


def test_a_fluxgym_command(desk):
    loaded = load_config(command_words(desk, "fangg_fluxgym_16g_adafactor"))
    assert values(loaded, "learning_rate", "max_grad_norm", "fp8_base", "loss_type") == (
        8e-4,
        0.0,
        True,
        "l2",
    )
    check_parts(loaded.config)


def test_prodigy_on_two_gpus_whatever_shares_the_work(desk):
    words = command_words(desk, "issue1475_two_gpus_deepspeed2_prodigy")
    words = without_options(words, "log_with", "wandb_run_name", "wandb_api_key")
    loaded = load_config(words)
    assert loaded.config.distributed.uses_deepspeed
    assert loaded.config.distributed.zero_stage == 2
    assert values(loaded, "optimizer_type", "learning_rate", "resolution") == ("prodigy", 1.0, (1024, 1024))
    assert values(loaded, "lr_warmup_steps", "train_batch_size") == (396, 4)
    check_parts(loaded.config)


def test_block_indices_train_two_single_blocks(desk):
    loaded = load_config(command_words(desk, "modal_single_blocks_7_20"))
    check_parts(loaded.config)
    narrow = FluxParams(
        vec_in_dim=8, context_in_dim=8, hidden_size=16, num_heads=2, mlp_hidden=16, axes_dim=(2, 2, 4)
    )
    assert (narrow.depth, narrow.depth_single_blocks) == (19, 38)
    with torch.device("meta"):
        transformer = Flux(narrow)
    network = create(loaded.config.network, text_encoders=[], transformer=transformer)
    network.apply()
    trained = list(network.module.state_dict())
    assert {name.split("_blocks_")[1].split("_")[0] for name in trained} == {"7", "20"}
    assert not any("modulation" in name or "double" in name for name in trained)


def test_a_batch_file_with_paths_of_windows_and_a_prompt_as_text(desk, monkeypatch):
    desk.file("train/persona_generator_partial.toml").rename(desk.folder / "config_face.toml")
    monkeypatch.chdir(desk.folder)
    words = script_words((WILD / "cli/sidney_config_file_plus_overrides_bat.txt").read_text())
    loaded = load_config(words)
    assert loaded.config.dataset.train_data_dir == Path(r"D:\Flux_Trainer\dataset\johnsmith")
    assert loaded.config.saving.output_name == "flux_lora_face_johndoe"
    assert loaded.config.memory.highvram
    assert [one.prompt for one in load_prompts(loaded.config.sampling.sample_prompts).prompts] == [
        "johndoe, portrait"
    ]


@pytest.mark.parametrize(
    ("name", "count", "notices"),
    [
        ("fluxgym_trigger_only.txt", 1, 0),
        ("topapec_prompts.json", 3, 0),
        ("cursoragent_comments_blank_lines.txt", 4, 0),
        ("pyatiyetaj_flux.txt", 2, 2),
        ("urdp001_cfg_flag.txt", 3, 3),
    ],
)
def test_prompt_files(name, count, notices):
    loaded = load_prompts(WILD / "prompts" / name)
    assert (len(loaded.prompts), len(loaded.notices)) == (count, notices)


def test_what_is_said_of_flags():
    (first, _) = load_prompts(WILD / "prompts/pyatiyetaj_flux.txt").notices
    assert "--l 3.5 (scale) is true classifier-free guidance" in first
    assert "--g (guidance_scale), 3.5 if not given" in first
    first = load_prompts(WILD / "prompts/urdp001_cfg_flag.txt").notices[0]
    assert '"--cfg 3.5" is not a known flag and is ignored; did you mean --l' in first
    assert "or --g" in first


def test_every_wild_file_is_looked_at():
    """A file that is added is named in a test."""
    here = Path(__file__).read_text()
    assert [
        path.stem for path in WILD.glob("*/*") if path.stem not in here and path.parent.name != "cli"
    ] == []
