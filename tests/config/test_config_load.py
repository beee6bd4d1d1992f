"""Command line and config file to a checked config: precedence, conversion, remarks and refusals."""

import random
from pathlib import Path

import pytest
import toml

from library.config.load import load_config
from library.config.notices import code_of
from library.config.show import output_config, resolved_table
from library.config.toml_file import key_lines
from library.config.train_config import OPTIONS
from library.errors import ConfigError

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
ARGUMENTS = ["--network_module", "networks.lora_flux", "--output_dir", "out", "--train_data_dir", "data"]
ARGUMENTS += ["--pretrained_model_name_or_path", "polyrank/tiny-flux"]


@pytest.fixture
def write(tmp_path):
    def write_config(text, *, base=BASE, encoding="utf-8"):
        path = tmp_path / "train.toml"
        path.write_bytes((base + text).encode(encoding))
        return path

    return write_config


def load(path, *words):
    return load_config(["--config_file", str(path), *words])


def refusal(path, *words):
    with pytest.raises(ConfigError) as caught:
        load(path, *words)
    return str(caught.value)


def test_command_line_beats_file_beats_default(write):
    loaded = load(write("network_dim = 16\nseed = 3\n"), "--network_dim", "32")
    assert loaded.config.network.network_dim == 32
    assert loaded.config.training.seed == 3
    assert loaded.config.training.max_train_steps == 1600
    assert loaded.sources["network_dim"] == "command line"
    assert loaded.sources["seed"] == "train.toml line 12"
    assert loaded.sources["max_train_steps"] == "default"
    assert loaded.notices == ()


def test_sections_are_dissolved_and_the_extension_may_be_left_out(write):
    path = write(
        "[any_name]\nnetwork_dim = '16'\n\n[other]\nlearning_rate = \"5e-5\"\n",
        base=BASE.rsplit("\n", 2)[0] + "\n",
    )
    loaded = load(path.with_suffix(""))
    assert loaded.config.network.network_dim == 16
    assert loaded.config.optimizer.learning_rate == 5e-5
    assert loaded.sources["network_dim"] == "train.toml [any_name] line 11"


def test_byte_order_mark_and_windows_line_ends(write):
    path = write(
        "seed = 7\r\ncaption_prefix = 'été'\r\n", base=BASE.replace("\n", "\r\n"), encoding="utf-8-sig"
    )
    loaded = load(path)
    assert loaded.config.training.seed == 7
    assert loaded.config.dataset.caption_prefix == "été"


def test_lists_flags_and_abbreviations_of_the_command_line():
    words = [
        "--network_args",
        "a=1",
        "b=2",
        "--text_encoder_lr",
        "1e-5",
        "2e-5",
        "--gradient_acc",
        "2",
        "--cache_latents",
    ]
    config = load_config([*ARGUMENTS, *words, "--resolution=512,768"]).config
    assert config.network.network_args == ("a=1", "b=2")
    assert config.optimizer.text_encoder_lr == (1e-5, 2e-5)
    assert config.training.gradient_accumulation_steps == 2
    assert config.caching.cache_latents is True
    assert config.dataset.resolution == (512, 768)


def test_a_repeated_list_option_keeps_the_last_and_says_so():
    loaded = load_config(
        [*ARGUMENTS, "--network_args", "a=1", "--network_args", "b=2", "--seed", "1", "--seed", "1"]
    )
    assert loaded.config.network.network_args == ("b=2",)
    assert [n for n in loaded.notices if "several times" in n] == [
        "command line: --network_args is given several times; the last counts, not a=1"
    ]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--learing_rate", "1"],
            "command line: unknown option '--learing_rate'; did you mean 'learning_rate'?",
        ),
        (["--network_dim", "many"], "command line: --network_dim many is not a whole number"),
        (["--network_dim"], "command line: argument --network_dim: expected one argument"),
        (["stray"], "command line: 'stray' belongs to no option"),
        (["--sdpa", "max"], "command line: 'max' belongs to no option"),
    ],
)
def test_wrong_command_lines_are_one_sentence(words, message):
    with pytest.raises(ConfigError) as caught:
        load_config([*ARGUMENTS, *words])
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def one_letter_wrong(name, generator):
    place = generator.randrange(len(name))
    letter = generator.choice([c for c in "abcdefghijklmnopqrstuvwxyz" if c != name[place]])
    return name[:place] + letter + name[place + 1 :]


MUTATED = [
    (name, one_letter_wrong(name, random.Random(name)))
    for name in random.Random(0).sample([name for name in OPTIONS if len(name) > 3], 60)
]


@pytest.mark.parametrize(("name", "wrong"), MUTATED)
def test_a_key_with_one_wrong_letter_is_refused_with_the_right_one(write, name, wrong):
    message = refusal(write(f"[some]\n{wrong} = 1\n"))
    assert message == f"train.toml [some] line 12: unknown option '{wrong}'; did you mean '{name}'?"


def test_unknown_keys_are_listed_once(write):
    loaded = load(write("_made_by = 'me'\n[inference]\nhires = 0.75\nsteps = 35\n"))
    assert loaded.notices == (
        "Keys without effect here: steps (sample_prompts say it for each picture)",
        "Ignored keys, which are no options: _made_by (train.toml line 11), hires (train.toml [inference] line 13)",
    )
    assert "strict_config" in refusal(write("hires = 35\n"), "--strict_config")


def test_strict_config_refuses_advice_too_unless_it_is_ignored():
    with pytest.raises(ConfigError, match=r"\[flux-guidance\] guidance_scale is not given"):
        load_config([*ARGUMENTS, "--strict_config"])
    codes = [code_of(notice) for notice in load_config(ARGUMENTS).notices]
    assert "flux-guidance" in codes
    assert load_config([*ARGUMENTS, "--strict_config", "--ignore_advice", ",".join(codes)]).notices == ()


def test_a_key_given_twice_counts_later_and_says_so(write):
    loaded = load(write("[a]\nresolution = 1024\n[b]\nresolution = '512,512'\n"))
    assert loaded.config.dataset.resolution == (512, 512)
    assert loaded.notices == (
        "resolution is given twice: 1024 (train.toml [a] line 12), then '512,512' (train.toml [b] line 14), "
        "which counts",
    )


def test_aliases_of_other_trainers(write):
    loaded = load(write("batch_size = 4\nepoch = 10\n"))
    assert loaded.config.dataset.train_batch_size == 4
    assert loaded.config.training.max_train_epochs == 10
    assert "batch_size is taken as train_batch_size" in loaded.notices[0]
    # A GUI writes `epoch` beside the steps it computed from it; the steps are what counts.
    loaded = load(write("max_train_steps = 200\nepoch = 10\n"))
    assert loaded.config.training.max_train_epochs is None
    assert loaded.notices == ("Keys without effect here: epoch (max_train_steps is given)",)
    # So do steps on the command line.
    loaded = load(write("epoch = 10\n"), "--max_train_steps", "20")
    assert loaded.config.training.max_train_epochs is None


@pytest.mark.parametrize(
    ("text", "option", "value"),
    [
        ("cache_latents_to_disk = true", "cache_latents", True),
        ("cache_text_encoder_outputs_to_disk = 1", "cache_text_encoder_outputs", True),
        ('mixed_precision = "bf16"\nfp8_base_unet = true', "fp8_base", True),
        ('caption_extention = ".txt"', "caption_extension", ".txt"),
        ("use_8bit_adam = true", "optimizer_type", "AdamW8bit"),
        ("use_lion_optimizer = true", "optimizer_type", "Lion"),
    ],
)
def test_implied_options(write, text, option, value):
    loaded = load(write(text + "\n"))
    assert loaded.config.value(option) == value
    assert loaded.sources[option].startswith("implied by ")


def test_implied_options_against_given_ones(write):
    assert "contradicts optimizer_type = 'Prodigy'" in refusal(
        write("use_8bit_adam=true\noptimizer_type='Prodigy'\n")
    )
    assert load(write("use_8bit_adam=true\noptimizer_type='adamw8bit'\n")).notices == ()
    loaded = load(write("cache_latents = false\ncache_latents_to_disk = true\n"))
    assert loaded.config.caching.cache_latents
    assert "overrides cache_latents = False" in loaded.notices[0]


@pytest.mark.parametrize(
    ("text", "blocks", "notice"),
    [
        ("blocks_to_swap = 12\n", 12, None),
        ("blocks_to_swap = 12\nsplit_mode = true\n", 12, "is ignored: blocks_to_swap = 12"),
        ("split_mode = true\n", 18, "is taken as blocks_to_swap = 18"),
        ("double_blocks_to_swap = 4\n", 4, "is taken as blocks_to_swap = 4"),
        (
            "double_blocks_to_swap = 4\nsingle_blocks_to_swap = '5'\n",
            7,
            "single_blocks_to_swap = 5, an old form",
        ),
        (
            "double_blocks_to_swap = 0\nblocks_to_swap = 0\n",
            0,
            "double_blocks_to_swap (blocks_to_swap is given)",
        ),
        ("single_blocks_to_swap = ''\n", None, None),
    ],
)
def test_old_forms_of_block_swap(write, text, blocks, notice):
    loaded = load(write(text))
    assert loaded.config.memory.blocks_to_swap == blocks
    assert [notice in line for line in loaded.notices] == ([] if notice is None else [True])


def test_old_swap_keys_are_numbers(write):
    assert "double_blocks_to_swap = 'many' is not a whole number" in refusal(
        write("double_blocks_to_swap='many'\n")
    )


def test_offloaded_activations_are_recomputed_ones(write):
    loaded = load(write("cpu_offload_checkpointing = true\nblocks_to_swap = 3\n"))
    assert loaded.config.memory.gradient_checkpointing
    assert loaded.sources["gradient_checkpointing"] == "implied by cpu_offload_checkpointing"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model_type", "chroma"], "Chroma models are not supported"),
        (["--weighted_captions"], "no word weights"),
        (["--dataset_class", "my.Data"], "in a metadata_file of dataset_config"),
    ],
)
def test_refused_options_say_what_to_do(words, message):
    with pytest.raises(ConfigError, match=r"^command line: ") as caught:
        load_config([*ARGUMENTS, *words])
    assert message in str(caught.value)


def test_options_without_effect_are_grouped_by_reason_and_never_stop_the_run(write):
    text = "xformers = true\nmem_eff_attn = true\nsdpa = true\nhighvram = true\n"
    assert load(write(text + "max_token_length = 75\nv2 = false\n")).notices == (
        "No effect: xformers, mem_eff_attn (`attention` chooses the kernel, "
        "by itself the fastest one that is right on the GPU at hand)",
        "No effect: highvram (it is never emptied between batches)",
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('ae: "x"\n', "train.toml line 11, column"),
        ("seed = \n", "this is not TOML"),
        ('vae = "C:\\Users\\me"\n', "write a Windows path with / or in single quotes"),
    ],
)
def test_broken_toml_is_named_with_its_line(write, text, message):
    path = write(text)
    said = refusal(path)
    assert message in said
    assert str(path) in said


def test_files_that_cannot_be_read(tmp_path, write):
    assert "there is no such file" in refusal(tmp_path / "none")
    assert "is not UTF-8" in refusal(write("caption_prefix = 'é'\n", encoding="latin-1"))
    assert "put its tables into a file of their own" in refusal(write("[[datasets]]\nresolution = 512\n"))


def test_lines_of_keys_are_found_behind_lists_comments_and_long_strings():
    text = '# a\nargs = [\n  "x=1", "y=[2", # ]\n  "z={",\n]\n'
    text += '"b" = """\nc = 1\n"""\n[t . u]\nd = 1\n[[v]]\ne = {f = 2}\n[[v.w]]\n[[v]]\n[[v.w]]\nx=1'
    assert toml.loads(text)["b"] == "c = 1\n"
    assert key_lines(text) == {
        ("args",): [2],
        ("b",): [6],
        ("t", "u"): [9],
        ("t", "u", "d"): [10],
        ("v",): [11, 14],
        ("v", 0): [11],
        ("v", 0, "e"): [12],
        ("v", 0, "w"): [13],
        ("v", 0, "w", 0): [13],
        ("v", 1): [14],
        ("v", 1, "w"): [15],
        ("v", 1, "w", 0): [15],
        ("v", 1, "w", 0, "x"): [16],
    }


def test_output_config_writes_what_differs_and_reads_back(tmp_path):
    target = tmp_path / "made.toml"
    words = [
        *ARGUMENTS,
        "--network_args",
        "a=1",
        "--learning_rate",
        "1e-4",
        "--wandb_api_key",
        "secret",
        "--cache_latents_to_disk",
        "--resolution=512x768",
    ]
    loaded = load_config([*words, "--config_file", str(target), "--output_config"])
    path, text = output_config(loaded)
    assert path == target
    assert set(toml.loads(text)) == {
        *("network_module", "output_dir", "train_data_dir", "pretrained_model_name_or_path"),
        *("network_args", "learning_rate", "cache_latents_to_disk", "resolution"),
    }
    assert toml.loads(text)["resolution"] == "512,768"  # Kohya's trainer takes a text only
    target.write_text(text)
    again = load_config(["--config_file", str(target)])
    assert again.config.network == loaded.config.network
    assert again.config.saving.output_dir == Path("out")
    with pytest.raises(ConfigError, match="exists"):
        output_config(loaded)
    with pytest.raises(ConfigError, match="needs --config_file"):
        output_config(load_config(["--output_config"]))


def test_resolved_table_has_every_option_and_hides_secrets(write):
    table = {row.name: row for row in resolved_table(load(write("seed = 3\n"), "--wandb_api_key", "secret"))}
    assert set(table) == set(OPTIONS)
    assert table["seed"] == (
        "training", "seed", "3", "train.toml line 11", "used", "decides every random choice",
    )  # fmt: skip
    assert table["wandb_api_key"].value == "***"
    assert table["xformers"].state == "none"
    assert table["xformers"].effect.startswith("none: `attention` chooses")
    assert table["max_train_epochs"].value == "-"
