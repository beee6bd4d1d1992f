"""Configs as users write them: what is meant is done and said, what cannot be meant is refused in one sentence."""

from __future__ import annotations

from pathlib import Path

import pytest

from library.config.datasets import resolve_datasets
from library.config.load import load_config
from library.config.prompts import load_prompts
from library.config.train_config import TrainConfig
from library.errors import ConfigError, DatasetError

BASE = """\
pretrained_model_name_or_path = "polyrank/tiny-flux"
network_module = "networks.lora_flux"
output_dir = "out"
train_data_dir = "data"
guidance_scale = 1.0
timestep_sampling = "shift"
discrete_flow_shift = 3.1582
model_prediction_type = "raw"
network_train_unet_only = true
learning_rate = 1e-4
"""
LINES = BASE.count("\n")


@pytest.fixture
def load(tmp_path):
    """Load BASE with this text behind it; a key of the text replaces BASE's."""

    def run(text, *words, encoding="utf-8"):
        keys = {line.partition("=")[0].strip() for line in text.splitlines() if "=" in line}
        kept = [line for line in BASE.splitlines() if line.partition("=")[0].strip() not in keys]
        path = tmp_path / "train.toml"
        path.write_bytes(("\n".join(kept) + "\n" + text).encode(encoding))
        return load_config(["--config_file", str(path), *words])

    return run


# Text of the file, options it gives, and pieces of what is said; with no pieces nothing is said.
MEANT = [
    (
        "\r\n# 训练 \r\nseed = 7   \t\r\noutput_name = '角色 v1'  # 名称\r\n",
        {"seed": 7, "output_name": "角色 v1"},
        [],
    ),
    (
        "seed\u00a0=\u00a07\u3000\noutput_name = 'a\u00a0b'\u00a0# c\n",
        {"seed": 7, "output_name": "a\u00a0b"},
        [],
    ),
    (
        "learning_rate = '1e-4'\nunet_lr = \"5e-5\"\nnetwork_dim = '32'\nnetwork_alpha = '16.0'\nseed = \"42\"\n",
        {"learning_rate": 1e-4, "unet_lr": 5e-5, "network_dim": 32, "network_alpha": 16.0, "seed": 42},
        [],
    ),
    (
        "cache_latents = 1\nflip_aug = 'True'\nsave_state = 'no'\nno_metadata = 0\n",
        {"cache_latents": True, "flip_aug": True, "save_state": False, "no_metadata": False},
        [],
    ),
    (
        "ae = ''\nnetwork_args = ''\ntext_encoder_lr = []\nresume = ''\nlog_with = ''\nsample_prompts = ''\n"
        "network_dropout = ''\nwandb_api_key = ''\ncaption_extension = ''\nresolution = ''\n",
        {"ae": None, "network_args": (), "text_encoder_lr": None, "caption_extension": ".caption"},
        [],
    ),
    ("text_encoder_lr = [0, 1e-5]\n", {"text_encoder_lr": (0.0, 1e-5)}, ["[text-encoder-lr-unused]"]),
    ("text_encoder_lr = '5e-5, 1e-5'\n", {"text_encoder_lr": (5e-5, 1e-5)}, ["[text-encoder-lr-unused]"]),
    (
        "network_args = 'train_blocks=single split_qkv=True'\n",
        {"network_args": ("train_blocks=single", "split_qkv=True")},
        [],
    ),
    (
        "network_args = [\n  'train_blocks=single',  # half of it, [really]\n  \"split_qkv=true\",\n]\n",
        {"network_args": ("train_blocks=single", "split_qkv=true")},
        [],
    ),
    (
        "[network_args]\ntrain_blocks = 'single'\nsplit_qkv = true\n",
        {"network_args": ("train_blocks=single", "split_qkv=True")},
        ["Taken as network_args, where Kohya's trainer expects them: train_blocks=single split_qkv=True"],
    ),
    (
        "[network.network_args]\ntrain_blocks = 'single'\n[optimizer.optimizer_args]\nbetas = [0.9, 0.99]\n",
        {"network_args": ("train_blocks=single",), "optimizer_args": ("betas=[0.9, 0.99]",)},
        [],
    ),
    (
        "network_args = ['split_qkv=False']\n[more]\nsplit_qkv = true\ntrain_double_block_indices = '0-3'\n",
        {"network_args": ("split_qkv=False", "train_double_block_indices=0-3")},
        ["Taken as network_args", "split_qkv (network_args has split_qkv)"],
    ),
    (
        "single_mod_dim = 0\nin_dims = [4, 4, 4, 4, 4]\n",
        {"network_args": ("single_mod_dim=0", "in_dims=4,4,4,4,4")},
        ["Taken"],
    ),
    (
        "network_module = 'lycoris.kohya'\nalgo = 'lokr'\nfactor = 8\nLyCORIS_preset = 'full'\nconstrain = 0\n"
        "train_blocks = 'all'\n",
        {"network_args": ("algo=lokr", "factor=8", "preset=full", "constraint=0")},
        ["Taken as network_args", "train_blocks (it is an argument of networks.lora_flux)"],
    ),
    (
        "algo = 'lokr'\nfactor = -1\nloraplus_lr_ratio = 0\nggpo_sigma = 0.03\nggpo_beta = 0.01\n"
        "train_lora_ggpo = false\n",
        {"network_args": ()},
        ["algo, factor (it is an argument of lycoris.kohya); ggpo_sigma, ggpo_beta (train_lora_ggpo is off)"],
    ),
    (
        "ggpo_sigma = 0.03\nggpo_beta = 0.01\nloraplus_lr_ratio = 4\n",
        {"network_args": ("ggpo_sigma=0.03", "ggpo_beta=0.01", "loraplus_lr_ratio=4")},
        ["Taken"],
    ),
    (
        "lr_scheduler = 'cosine'\nlr_warmup_steps = '5%'\nlr_decay_steps = 0.1\n",
        {"lr_warmup_steps": 0.05, "lr_decay_steps": 0.1},
        [],
    ),
    ("lr_scheduler = 'cosine'\nlr_warmup_steps = 100.0\n", {"lr_warmup_steps": 100}, []),
    (
        "lr_scheduler = 'cosine'\nlr_warmup = 10\n",
        {"lr_warmup_steps": 0.1},
        ["lr_warmup is taken as lr_warmup_steps"],
    ),
    ("resolution = 1024\n", {"resolution": (1024, 1024)}, []),
    ("resolution = [768, 1024]\n", {"resolution": (768, 1024)}, []),
    ("resolution = '768 x 1024'\n", {"resolution": (768, 1024)}, []),
    (
        "max_resolution = '512,512'\nbatch_size = 2\n",
        {"resolution": (512, 512), "train_batch_size": 2},
        ["max_resolution is taken as resolution", "batch_size is taken as train_batch_size"],
    ),
    (
        "[a]\nseed = 1\n[b]\nseed = 2\n",
        {"seed": 2},
        [
            f"seed is given twice: 1 (train.toml [a] line {LINES + 2}), then 2 (train.toml [b] line {LINES + 4}), "
            "which counts"
        ],
    ),
    ("epoch = 5\n", {"max_train_epochs": 5}, ["epoch is taken as max_train_epochs"]),
    ("epoch = 5\nmax_train_steps = 0\n", {"max_train_epochs": 5}, ["epoch is taken as max_train_epochs"]),
    ("optimizer = 'Lion'\noptimizer_type = ''\n", {"optimizer_type": "Lion"}, ["optimizer is taken as"]),
    (
        "network_module = 'networks.oft_flux'\nenable_all_linear = true\nrank_dropout = 0\n",
        {"network_args": ("enable_all_linear=True",)},
        ["Taken as network_args", "rank_dropout (it is an argument of networks.lora_flux and lycoris.kohya)"],
    ),
    ("logging_dir = '~nobody-of-that-name/logs'\n", {"logging_dir": Path("~nobody-of-that-name/logs")}, []),
    (
        "epoch = 5\nmax_train_steps = 900\n",
        {"max_train_epochs": None, "max_train_steps": 900},
        ["epoch (max_train_steps is given)"],
    ),
    (
        "max_train_epochs = 0\nsave_every_n_epochs = 0\nsave_every_n_steps = '200'\nmax_data_loader_n_workers = 2.0\n",
        {
            "max_train_epochs": None,
            "save_every_n_epochs": None,
            "save_every_n_steps": 200,
            "max_data_loader_n_workers": 2,
        },
        [],
    ),
    (
        "mixed_precision = 'BF16'\ntimestep_sampling = 'Shift'\nconsole_log_level = 'info'\nseed = -1\n",
        {"mixed_precision": "bf16", "timestep_sampling": "shift", "console_log_level": "INFO", "seed": None},
        [],
    ),
    (
        "train_data_dir = 'C:\\train\\new'\noutput_dir = \"D:/out put/é#1\"\n",
        {"train_data_dir": Path(r"C:\train\new"), "output_dir": Path("D:/out put/é#1")},
        [],
    ),
    ("logging_dir = '\"my logs/a\"'\n", {"logging_dir": Path("my logs/a")}, []),
    ('logging_dir = "C:\\\\logs"\n', {"logging_dir": Path(r"C:\logs")}, []),
    ("dynamo_backend = 'no'\n", {"torch_compile": False, "dynamo_backend": "inductor"}, []),
    (
        "dynamo_backend = 'inductor'\ntorch_compile = false\n",
        {"torch_compile": False},
        ["is ignored: torch_compile = False (train.toml line 12) is given"],
    ),
    (
        "torch_compile_backend = 'eager'\n",
        {"torch_compile": True, "dynamo_backend": "eager"},
        ["torch_compile_backend is taken as dynamo_backend", "turns torch_compile on"],
    ),
    (
        "flux1_clip_l = 'c.safetensors'\nflux1_checkbox = true\nnum_processes = 2\nmin_snr_gamma = 5\n",
        {"clip_l": "c.safetensors"},
        [
            "flux1_clip_l is taken as clip_l",
            "flux1_checkbox (it is a state of the GUI); num_processes (num_gpus says it, or accelerate launch)",
            "No effect: min_snr_gamma",
        ],
    ),
    (
        "[[notes]]\nby = 'me'\n[links]\nsource = {url = 'x'}\n",
        {},
        [
            "Ignored keys, which are no options: notes (train.toml line 11), source (train.toml [links] line 14)"
        ],
    ),
    (
        "sample_every_n_steps = 5\nsample_prompts = '''\na cat --w 64\n# no\na dog'''\n",
        {"sample_prompts": "a cat --w 64\n# no\na dog"},
        [],
    ),
]


@pytest.mark.parametrize(("text", "options", "pieces"), MEANT, ids=[text[:40] for text, _, _ in MEANT])
@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_what_is_meant_is_done(load, text, options, pieces, encoding):
    loaded = load(text, encoding=encoding)
    assert {name: loaded.config.value(name) for name in options} == options
    assert [type(loaded.config.value(name)) for name in options] == [
        type(value) for value in options.values()
    ]
    assert all(any(piece in notice for notice in loaded.notices) for piece in pieces), loaded.notices
    assert bool(loaded.notices) == bool(pieces), loaded.notices


REFUSED = [
    (
        "vae = 'x'\nae = \"C:\\Users\\me\"\n",
        "train.toml line 12, column 11: this is not TOML",
        "in single quotes, 'C:\\folder",
    ),
    (
        'ae = "C:\\train\\new"\n',
        "train.toml line 11: ae = 'C:\\train\\new'",
        "write the path with / or in single quotes",
    ),
    (
        'output_dir = "C:\\flux"\n',
        "train.toml line 10: output_dir = 'C:\\x0clux'",
        "a backslash in double quotes is an escape",
    ),
    (
        "seed = 1\nflip_aug = true\nseed = 2\n",
        "line 13, column 9: seed is given twice, first on line 11",
        "remove one",
    ),
    ("[a]\nseed = 1\n[a]\n", "line 13, column 3: this is not TOML", "twice"),
    (
        "cache_latents = True\n",
        "line 11, column 17: this is not TOML",
        "write true or false in small letters",
    ),
    ("seed: 1\n", "line 11, column 5: this is not TOML", "the colon is YAML's or JSON's"),
    ("network_args = [\n'a=1',\n", "line 12, column 7: this is not TOML", "such as a closing bracket"),
    (
        "[a.b]\nseed = 1\n",
        "train.toml [a] line 11: the table b stands inside another one, so seed would not be read",
        "write it as [b]",
    ),
    (
        "[a]\n[[a.subsets]]\nimage_dir = 'x'\n",
        "train.toml [a] line 12: subsets describes datasets",
        "dataset_config",
    ),
    ("learning_rate = 'fast'\n", "train.toml line 10: learning_rate = 'fast'", "is not a number"),
    ("network_dim = [16]\n", "train.toml line 11: network_dim = [16]", "is not a whole number"),
    (
        "save_precision = 'fp32'\n",
        "train.toml line 11: save_precision = 'fp32'",
        "is not one of float, fp16, bf16",
    ),
    (
        "train_t5xxl = true\nnetwork_train_unet_only = false\ncache_text_encoder_outputs = true\n",
        "network_args train_t5xxl=True (train.toml line 10)",
        "T5's outputs change while it is trained",
    ),
    ("double_blocks_to_swap = 'few'\n", "train.toml line 11: double_blocks_to_swap", "is not a whole number"),
    (
        "sample_every_n_steps = 5\nsample_prompts = 'promts.txt'\n",
        "sample_prompts = 'promts.txt' (train.toml line 12): there is no such file",
        "",
    ),
    ("Network_Dim = 8\n", "train.toml line 11: unknown option 'Network_Dim'", "did you mean 'network_dim'?"),
    (
        "train-batch-size = 8\n",
        "train.toml line 11: unknown option 'train-batch-size'",
        "did you mean 'train_batch_size'?",
    ),
]


@pytest.mark.parametrize(("text", "start", "advice"), REFUSED, ids=[text[:40] for text, _, _ in REFUSED])
def test_what_cannot_be_meant_is_refused(load, text, start, advice):
    with pytest.raises(ConfigError) as caught:
        load(text)
    message = str(caught.value)
    assert start in message.replace("\t", "\\t")
    assert advice in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ["--cache_latents", "true"],
            "'true' belongs to no option; names of options start with --; a flag stands alone",
        ),
        (["--cache_latents=true"], "argument --cache_latents: takes no value, not 'true'"),
        (["--seed", "1", "\\"], "'\\\\' stands alone; to go on in the next line, end the line with \\"),
        (["--seed", "1", " "], "' ' stands alone"),
        (["--seed", "1", "^", "--sdpa"], "'^' stands alone"),
        (["--batch_size", "4"], "unknown option '--batch_size'; here it is --train_batch_size"),
        (
            ["--train_blocks", "single"],
            "unknown option '--train_blocks'; give it as --network_args train_blocks=...",
        ),
        (
            ["--num_processes=2"],
            "unknown option '--num_processes'; leave it out: num_gpus says it, or accelerate launch",
        ),
        (["--double_blocks_to_swap", "2"], "here it is --blocks_to_swap"),
        (
            ["--cache_latent"],
            "ambiguous option: --cache_latent could match --cache_latents, --cache_latents_to_disk",
        ),
        (["--network-dim", "4"], "unknown option '--network-dim'; did you mean 'network_dim'?"),
        (["--network_dim=4=5"], "--network_dim 4=5 is not a whole number"),
    ],
)
def test_command_lines_that_are_refused(load, words, sentence):
    with pytest.raises(ConfigError) as caught:
        load("", *words)
    assert str(caught.value).startswith("command line: ")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


def test_secrets_are_never_shown(load):
    text = "[a]\nhuggingface_token = 'hf_abc'\n[b]\nhuggingface_token = 'hf_def'\n"
    loaded = load(text, "--wandb_api_key", "key_abc", "--wandb_api_key", "key_def")
    said = "\n".join(loaded.notices)
    assert "huggingface_token is given twice: ***" in said
    assert "--wandb_api_key is given several times; the last counts, not ***" in said
    assert "abc" not in said
    assert "def" not in said.replace("default", "")


def test_the_config_file_is_found_by_its_name_with_and_without_ending(tmp_path):
    (tmp_path / "my.config.v2.toml").write_text(BASE + "seed = 3\n")
    for name in ("my.config.v2", "my.config.v2.toml"):
        assert load_config(["--config_file", str(tmp_path / name)]).config.training.seed == 3
    (tmp_path / "other.txt").touch()
    for name, hint in (
        ("my.confg.v2", "; did you mean 'my.config.v2.toml'?"),
        ("x", "; the folder has my.config.v2.toml"),
        ("no/x", f", and no folder {tmp_path / 'no'}"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(["--config_file", str(tmp_path / name)])
        assert str(caught.value) == f"{tmp_path / name}.toml: there is no such file{hint}"
    (tmp_path / "my.config.v2.toml").rename(tmp_path / "TRAIN.TOML")
    assert load_config(["--config_file", str(tmp_path / "TRAIN.TOML")]).config.training.seed == 3
    with pytest.raises(ConfigError, match="is a folder: name the file in it"):
        load_config(["--config_file", str(tmp_path)])


TABLES = "[[datasets]]\nresolution = '1024,768'\n[[datasets.subsets]]\nimage_dir = 'IMAGES'\n"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "[general]\nseed = 1\n" + TABLES,
            "data.toml [general] (line 2): unknown key 'seed', which is an option: give it",
        ),
        (
            "network_args = []\n" + TABLES,
            "data.toml line 1: 'network_args' stands outside [general] and [[datasets]], which",
        ),
        (
            "[general]\ntrain_batch_size = 2\n" + TABLES,
            "unknown key 'train_batch_size', which is an option: ",
        ),
        (
            TABLES.replace("datasets.subsets", "datasets.subset"),
            "data.toml [[datasets]] 1 (line 3): unknown key 'subset'; did you mean 'subsets'?",
        ),
        (
            TABLES.replace("[[datasets]]", "[datasets]"),
            "data.toml line 1: datasets must be an array of tables",
        ),
        (
            "[[datasets]]\nimage_dir = 'x'\n",
            "data.toml [[datasets]] 1 (line 2): image_dir cannot stand in [[datasets]]",
        ),
        (
            TABLES + "num_repeats = 1\nnum_repeats = 2\n",
            "num_repeats is given twice, first on line 5; remove one of them",
        ),
        (
            TABLES + "flip_aug = 2\n",
            "data.toml [[datasets]] 1, subset 1 (line 5): flip_aug = 2 is not true or false",
        ),
        (
            TABLES + TABLES + "is_rge = 1\n",
            "data.toml [[datasets]] 2, subset 1 (line 9): unknown key 'is_rge'; did you mean",
        ),
        (
            TABLES.replace("'IMAGES'", '"C:\\train"'),
            "(line 4): image_dir = 'C:\\train' has a control character in it, as a backslash in double quotes is an",
        ),
    ],
)
def test_dataset_files_that_cannot_be_meant_are_refused(tmp_path, text, sentence):
    (tmp_path / "images").mkdir()
    path = tmp_path / "data.toml"
    path.write_text(text.replace("IMAGES", str(tmp_path / "images")))
    with pytest.raises(ConfigError) as caught:
        resolve_datasets(TrainConfig.from_values({"dataset_config": path}))
    assert sentence in str(caught.value).replace("\t", "\\t")
    assert "\n" not in str(caught.value)


def test_dataset_files_as_users_write_them(tmp_path):
    (tmp_path / "images").mkdir()
    path = tmp_path / "data.toml"
    path.write_bytes(
        "\ufeff[general]\r\nenable_bucket\u00a0= 1\r\nbatch_size = '2'\r\ncaption_extension = ''\r\n"
        f"[[datasets]]\r\nresolution = '1024 x 768'\r\nsubsets = [ {{image_dir = '{tmp_path / 'images'}', "
        "num_repeats = 3.0, flip_aug = 'true', face_crop_aug_range = [1, 2.5]} ]  # 图片\r\n".encode()
    )
    (dataset,) = resolve_datasets(TrainConfig.from_values({"dataset_config": path}))
    assert (dataset.resolution, dataset.batch_size, dataset.enable_bucket) == ((1024, 768), 2, True)
    (subset,) = dataset.subsets
    assert (subset.num_repeats, subset.flip_aug, subset.face_crop_aug_range) == (3, True, (1.0, 2.5))
    assert subset.caption_extension == ".caption"
    path.write_text("[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'img\\10_me'\n")
    with pytest.raises(
        DatasetError, match=r"image_dir img\\10_me is not a folder(; here folders are separated by /)?$"
    ):
        resolve_datasets(TrainConfig.from_values({"dataset_config": path}))


def test_repeats_reach_the_dataset_files_that_name_none(load, tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "more").mkdir()
    data = tmp_path / "data.toml"
    data.write_text(
        f"[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'images'}'\n"
        f"[[datasets.subsets]]\nimage_dir = '{tmp_path / 'more'}'\nnum_repeats = 2\n"
    )
    loaded = load(f"num_repeats = 10\ndataset_config = '{data}'\n")
    assert [one.num_repeats for one in resolve_datasets(loaded.config)[0].subsets] == [10, 2]
    assert "num_repeats (the names of the folders" in load("num_repeats = 10\n").notices[0]


def test_a_folder_is_no_prompt(tmp_path):
    with pytest.raises(ConfigError, match="this is a folder; name a prompt file in it"):
        load_prompts(str(tmp_path))
    (notice,) = load_prompts(["a --d 1 --l 4.5"]).notices
    assert "--l 4.5 (scale) is true classifier-free guidance" in notice
