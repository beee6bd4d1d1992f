"""The table of options against Kohya's parser, and the pages made of it."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

from library.config.cli import help_text, make_parser
from library.config.dataset_keys import KEYS
from library.config.foreign import (
    ALIASES,
    DATASET_TABLES,
    NETWORK_ARGUMENTS,
    OLD_SWAP_KEYS,
    WITHOUT_EFFECT,
    what_instead,
)
from library.config.implied import IMPLICATIONS
from library.config.kinds import KINDS, to_int, to_steps, to_texts
from library.config.names import nearest, one_slip
from library.config.options import UNSET
from library.config.reference import options_markdown
from library.config.train_config import OPTIONS, SECTIONS, TrainConfig
from library.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
KOHYA = {row["dest"]: row for row in json.loads((ROOT / "tests/data/config/kohya_options.json").read_text())}
OURS = {"global_batch_size", "dry_run", "dry_run_json", "strict_config", "ignore_advice"}
OURS |= {"text_cache_variants", "trigger_word", "skip_image_resolution"}
OURS |= {"distributed", "ds_config", "local_rank", "num_gpus", "preflight"}
OURS |= {"keep_best", "early_stop_patience", "early_stop_min_delta", "no_run_log", "report_every_n_steps"}
OURS |= {"ema_decay", "ema_on_cpu", "ema_for_samples"}
OURS |= {
    "base_compute",
    "compile_blocks",
    "attention",
    "join_adapter",
    "recompute",
    "recompute_blocks",
    "cuda_graphs",
}
OURS |= {"no_workflow", "no_card"}
# The type that Kohya's parser declares for options of each of our types.
KOHYA_TYPES = {
    "bool": "bool",
    "int": "int",
    "float": "float",
    "int | float": "int_or_float",
    "str": "str",
    "PromptText": "str",
    "ModelName": "str",
    "Path": "str",
    "tuple[int, int]": "str",
    "tuple[float, float]": "str",
    "tuple[str, ...]": "str",
    "tuple[Path, ...]": "str",
    "tuple[float, ...]": "float",
}


def test_every_option_of_kohya_is_a_row_and_only_ours_come_on_top():
    assert len(KOHYA) == 216
    assert set(OPTIONS) == (set(KOHYA) - {"help"}) | OURS
    assert {name for name, item in OPTIONS.items() if item.row.ours} == OURS


@pytest.mark.parametrize("name", sorted(KOHYA))
def test_row_equals_kohyas(name):
    row = KOHYA[name]
    if name == "help":
        assert make_parser().format_help().count("-h, --help ") == 1
        return
    item = OPTIONS[name]
    default = None if item.row.default == () else item.row.default
    assert default == row["default"]
    # Kohya writes the default of three numbers as 1 or 0, where argparse would give floats for words.
    assert type(default) is (
        float if type(row["default"]) is int and row["type"] == "float" else type(row["default"])
    )
    assert list(item.row.choices) == [choice for choice in row["choices"] or [] if choice is not None]
    assert item.kind.many == (row["nargs"] == "*")
    # Kohya declares one path as a Path and leaves two choices untyped; all three are words to the user.
    assert KOHYA_TYPES[item.type] == {"Path": "str", None: "str"}.get(row["type"], row["type"])


def test_every_row_explains_itself():
    for item in OPTIONS.values():
        assert item.row.help
        assert item.type in KINDS
        assert (item.row.effect.state == "used") == (item.row.effect.reason == "")


def test_defaults_are_values_of_their_rows():
    config = TrainConfig()
    for name, value in config.flat().items():
        assert value == OPTIONS[name].row.default
    assert TrainConfig.from_values({"network_dim": 8}).network.network_dim == 8
    assert list(SECTIONS) == [
        *(
            "model",
            "network",
            "dataset",
            "caching",
            "objective",
            "optimizer",
            "schedule",
            "training",
            "averaging",
            "memory",
        ),
        *("distributed", "saving", "metadata", "logging", "sampling", "validation", "other", "run"),
    ]


def test_kohyas_abbreviations_stay_unambiguous():
    kohya, parser = set(KOHYA), make_parser()
    for name in kohya:
        for length in range(1, len(name)):
            prefix = name[:length]
            if sum(other.startswith(prefix) for other in kohya) == 1:
                meant = {action.dest for action, *_ in parser._get_option_tuples(f"--{prefix}")}
                assert meant in ({name}, set())


def test_foreign_keys_are_no_options():
    tables = (ALIASES, NETWORK_ARGUMENTS, OLD_SWAP_KEYS, WITHOUT_EFFECT)
    assert not {key for table in tables for key in table} & set(OPTIONS)
    assert sum(map(len, tables)) == len({key for table in tables for key in table})
    assert all(alias.option in OPTIONS for alias in ALIASES.values())


@pytest.mark.parametrize(
    ("name", "raw", "value"),
    [
        ("learning_rate", "1e-4", 1e-4),
        ("recompute_blocks", "16", 16),
        ("recompute_blocks", 0, 0),
        ("recompute_blocks", "Auto", "auto"),
        ("recompute_blocks", "all", UNSET),
        ("learning_rate", 1, 1.0),
        ("resolution", "1024", (1024, 1024)),
        ("resolution", 1024, (1024, 1024)),
        ("resolution", "1024,768", (1024, 768)),
        ("resolution", [1024, 768], (1024, 768)),
        ("resolution", "", UNSET),
        ("lr_warmup_steps", "10%", 0.1),
        ("lr_warmup_steps", "0.1", 0.1),
        ("lr_warmup_steps", "100", 100),
        ("lr_warmup_steps", 100.0, 100),
        ("lr_warmup_steps", 0.25, 0.25),
        ("text_encoder_lr", 5e-5, (5e-5,)),
        ("text_encoder_lr", ["1e-5", 2e-5], (1e-5, 2e-5)),
        ("text_encoder_lr", [], UNSET),
        ("network_args", "", UNSET),
        ("network_args", "a=1 b=(0.9, 0.99)", ("a=1", "b=(0.9, 0.99)")),
        ("network_args", ["a=1", "b=2"], ("a=1", "b=2")),
        ("cache_latents", 1, True),
        ("cache_latents", "False", False),
        ("log_with", "", UNSET),
        ("dynamo_backend", "no", UNSET),
        ("save_every_n_steps", 0, UNSET),
        ("train_data_dir", "a/b", Path("a/b")),
        ("face_crop_aug_range", "2.0,4", (2.0, 4.0)),
        ("sample_prompts", ["a cat", "a dog"], "a cat\na dog"),
        ("seed", 2**62 + 1, 2**62 + 1),
        ("output_name", 2024, "2024"),
    ],
)
def test_values_are_read_from_words_and_from_file_values(name, raw, value):
    read = OPTIONS[name].read(raw, "x.toml line 1")
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("learning_rate", "fast", "learning_rate = 'fast' is not a number"),
        ("learning_rate", float("nan"), "is not a number"),
        ("learning_rate", True, "is not a number"),
        ("learning_rate", -1, "must be >= 0"),
        ("network_dim", 4.5, "is not a whole number"),
        ("network_dim", 0, "must be >= 1"),
        ("cache_latents", 2, "is not true or false"),
        ("resolution", "big", "is not a size in pixels"),
        ("resolution", [1, 2, 3], "is not a size in pixels"),
        ("face_crop_aug_range", "4,2", "two ascending numbers"),
        ("lr_warmup_steps", "120%", "more than 100%"),
        ("caption_dropout_rate", 1.5, "must be >= 0 and <= 1"),
        ("timestep_sampling", "sigmoidal", "is not one of sigma, uniform, sigmoid, shift, flux_shift"),
        ("timestep_sampling", "sigmoidal", "did you mean 'sigmoid'"),
        ("output_dir", ["a"], "is not text"),
    ],
)
def test_wrong_values_are_named_with_their_place(name, raw, words):
    with pytest.raises(ConfigError, match=r"^x\.toml line 1: ") as caught:
        OPTIONS[name].read(raw, "x.toml line 1")
    assert words in str(caught.value)


def test_small_converters():
    assert to_int("-3") == -3
    assert to_steps("0.5%") == pytest.approx(0.005)
    assert to_texts("betas=0.9,0.99") == ("betas=0.9,0.99",)
    assert one_slip("learing", "learning")
    assert one_slip("sede", "seed")
    assert not one_slip("clip", "ae")
    assert nearest("log_every_n_steps", OPTIONS) == ()
    assert nearest("full_f16", OPTIONS) == ("full_fp16", "full_bf16")


def test_help_has_a_line_for_every_option_with_its_default():
    page = " ".join(make_parser().format_help().split())
    assert all(f"--{name}" in page for name in OPTIONS)
    assert "(default: 3.5)" in help_text(OPTIONS["guidance_scale"])
    assert help_text(OPTIONS["xformers"]).endswith("[no effect]")
    assert help_text(OPTIONS["dry_run"]).endswith("[not in Kohya's]")
    assert all(f"[{section}] " in page for section in SECTIONS)


def test_reference_page_is_up_to_date():
    assert (ROOT / "docs/options.md").read_text(encoding="utf-8") == options_markdown(), (
        "run python -m tools.write_options"
    )


def test_reading_options_imports_nothing_heavy():
    program = (
        "import sys; import library.config.load, library.config.datasets; "
        "print([name for name in ('torch', 'numpy', 'PIL', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def attributes(paths):
    """Names that code reads as attributes, and its texts."""
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))]
    return {
        *(node.attr for node in nodes if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load)),
        *(node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)),
    }


def test_every_used_option_is_read_somewhere(repository):
    """An option that says it is used is read outside the modules that declare, check and print options."""
    files = [repository / "flux_train_network.py"]
    files += [path for top in ("library", "networks") for path in (repository / top).rglob("*.py")]
    aside = {"config", "preflight"}
    read = attributes(path for path in files if not aside & set(path.relative_to(repository).parts))
    # A dataset's settings fall back on options; where data comes from is settled when they are resolved.
    read |= {key.fallback for name, key in KEYS.items() if name in read}
    read |= attributes([repository / "library/config/datasets.py"])
    read |= {rule.option for rule in IMPLICATIONS if rule.target in read}
    elsewhere = {
        "config_file",
        "strict_config",
        "output_config",
        "ignore_advice",
    }  # acted on while options are read
    elsewhere |= {"deepspeed"}  # read as DistributedConfig.uses_deepspeed
    one_value = {"model_type"}  # another value than the one that holds anyway is refused
    used = {name for name, row in OPTIONS.items() if row.row.effect.state == "used"}
    assert used - read - elsewhere <= one_value


def test_every_key_seen_in_published_configs_has_a_meaning_or_a_reason():
    lines = (ROOT / "tests/data/config/foreign_keys.txt").read_text().splitlines()[1:]
    assert len(lines) == 149
    known = {*ALIASES, *NETWORK_ARGUMENTS, *OLD_SWAP_KEYS, *WITHOUT_EFFECT, *DATASET_TABLES}
    assert set(lines) <= known
    assert all(reason and not reason.endswith(".") for reason in WITHOUT_EFFECT.values())
    assert all(what_instead(key) for key in known - DATASET_TABLES)
    assert what_instead("seed") == ""
