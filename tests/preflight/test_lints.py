"""Each lint on data that deserves it, and silence on data that does not."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import toml
from safetensors.torch import load_file, save_file

from flux_train_network import main
from library.config.notices import Notices, code_of
from library.config.rule_context import Context
from library.config.train_config import TrainConfig
from library.models.tiny import ensure_tiny_flux
from library.preflight.evidence import Evidence
from library.preflight.facts import DiskFacts
from library.preflight.model_lints import precision_suits_the_size
from library.preflight.run_lints import disks_have_room
from tests.e2e.running import ROOT, draw_pictures, write_config
from tests.preflight.dry_runs import advice, dry_run

SIZES = [(96, 64), (64, 96), (80, 80), (100, 60)]
# 4 pictures x 2 repeats in batches of 2: 4 steps an epoch; 20 epochs show each picture 40 times.
SOUND = {"max_train_epochs": 20, "discrete_flow_shift": 3.1582, "network_dim": 4, "network_alpha": 4}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    draw_pictures(folder / "2_waves", SIZES)
    return folder


def test_a_sound_run_and_the_quickstart_get_no_advice(tmp_path: Path, pictures: Path):
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", **SOUND)
    assert dry_run(config)["notices"] == []
    shipped = toml.load(ROOT / "configs" / "quickstart.toml")
    config = tmp_path / "quickstart.toml"
    config.write_text(toml.dumps(shipped), encoding="utf-8")
    assert dry_run(config, "--output_dir", str(tmp_path / "new"))["notices"] == []


@pytest.mark.parametrize(
    ("changes", "code", "said"),
    [
        ({"enable_bucket": False}, "images-cropped", "3 of 4 images are cropped to the shape of resolution"),
        (
            {"cache_text_encoder_outputs": False},
            "text-encoders-loaded",
            "T5 and CLIP-L stay in memory and run",
        ),
        (
            {"resolution": "176,176", "max_bucket_reso": 256},
            "images-enlarged",
            "of 4 images are enlarged more than",
        ),
        ({"train_batch_size": 8}, "buckets-small", "do not fill one batch of train_batch_size"),
        ({"t5xxl_max_token_length": 8}, "captions-cut", "4 captions have more than 8 T5 tokens"),
        (
            {"caption_prefix": "x " * 300, "t5xxl_max_token_length": 512},
            "captions-cut",
            "more than 512 T5 tokens",
        ),
        ({"max_train_epochs": 5}, "steps-few", "each image is seen 10 times in 20 steps"),
        ({"max_train_epochs": 200}, "steps-many", "each image is seen 400 times"),
        ({"save_every_n_epochs": 21}, "save-never", "save_every_n_epochs = 21 (c.toml line"),
        ({"save_every_n_steps": 500}, "save-never", "the run has only 80 steps"),
        (
            {"sample_prompts": "a", "sample_every_n_epochs": 30},
            "sample-never",
            "the run has only 20 epochs, so it never comes round",
        ),
        ({"validation_split": 0.25, "max_train_epochs": 27}, "validation-small", "holds back one image"),
        ({"validation_split": 0.2}, "validation-empty", "nothing is validated"),
        (
            {"validation_split": 0.5, "max_train_epochs": 27, "validate_every_n_steps": 999},
            "validation-never",
            "validate_every_n_steps = 999",
        ),
        ({"prior_loss_weight": 0.5}, "prior-loss-weight-unused", "there is no regularisation image"),
        ({"network_dim": 16, "network_alpha": None}, "network-alpha", "is scaled by 0.0625"),
        ({"network_dim": None}, "network-dim-default", "4 for networks.lora_flux"),
        ({"caption_prefix": "trigger,", "caption_extension": ".cap"}, None, ""),
        ({"caption_dropout_rate": 0.1}, None, ""),
        ({"train_batch_size": 1, "max_train_epochs": 40}, None, ""),
    ],
)
def test_advice_on_data_and_schedule(
    tmp_path: Path, pictures: Path, changes: dict[str, object], code: str | None, said: str
):
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", **{**SOUND, **changes})
    given = advice(dry_run(config))
    assert set(given) == ({code} if code else set())
    if code:
        assert said in given[code]
        assert "; recommended: " in given[code] or code.endswith(("-never", "-unused"))
        assert advice(dry_run(config, "--ignore_advice", code)) == {}


def test_advice_on_captions_and_copies(tmp_path: Path):
    folder = draw_pictures(tmp_path / "data" / "2_waves", SIZES)
    for path in folder.glob("*.txt"):
        path.write_text("waves", encoding="utf-8")
    shutil.copy(folder / "picture1.png", folder / "copy.png")
    (folder / "copy.txt").write_text("waves", encoding="utf-8")
    config = write_config(tmp_path / "c.toml", tmp_path / "data", tmp_path / "out", **SOUND)
    given = advice(dry_run(config))
    assert given["images-identical"].startswith(
        "[images-identical] 1 image is there more than once (2_waves/copy.png = 2_waves/pict"
    )
    # The folder's own words would be the caption without files, so "waves" says nothing more.
    assert "captions-identical" not in given
    for path in folder.glob("*.txt"):
        path.write_text("a wave", encoding="utf-8")
    assert 'all 5 images have the caption "a wave"' in advice(dry_run(config))["captions-identical"]
    (folder / "picture0.txt").write_text("\na caption too low\n", encoding="utf-8")
    assert "1 image trains without words (picture0.png)" in advice(dry_run(config))["captions-empty"]


def test_strict_config_lets_nothing_pass_before_a_model_is_loaded(
    tmp_path: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
):
    config = write_config(tmp_path / "c.toml", pictures, tmp_path / "out", **{**SOUND, "max_train_epochs": 5})
    assert main(["--config_file", str(config), "--strict_config"]) == 2
    printed = capsys.readouterr().err.strip().splitlines()
    assert printed[-1].startswith(
        "error: strict_config allows none of this: [steps-few] each image is seen 10 times"
    )
    assert not (tmp_path / "out").exists()
    assert (
        main(["--config_file", str(config), "--strict_config", "--ignore_advice", "steps-few", "--dry_run"])
        == 0
    )


def test_what_is_odd_about_prompts_is_part_of_the_report(tmp_path: Path, pictures: Path):
    config = write_config(
        tmp_path / "c.toml", pictures, tmp_path / "out", **SOUND, sample_every_n_steps=4,
        sample_prompts="a wave --w 64 --h 64 --cfg 4",
    )  # fmt: skip
    (notice,) = dry_run(config)["notices"]
    assert '"--cfg 4" is not a known flag and is ignored; did you mean --l' in notice["text"]
    assert main(["--config_file", str(config), "--dry_run", "--strict_config"]) == 2


def test_schnell_is_named(tmp_path: Path, pictures: Path):
    tensors = load_file(ensure_tiny_flux() / "flux.safetensors")
    schnell = tmp_path / "flux1-schnell.safetensors"
    save_file({name: t for name, t in tensors.items() if "guidance_in." not in name}, schnell)
    config = write_config(
        tmp_path / "c.toml", pictures, tmp_path / "out", **SOUND, pretrained_model_name_or_path=str(schnell)
    )
    assert "flux1-schnell.safetensors is FLUX.1 schnell" in advice(dry_run(config))["schnell-base"]


def test_float32_is_named_on_a_model_of_the_real_size():
    notices = Notices()
    forecast = SimpleNamespace(trained=SimpleNamespace(base_parameters=11_901_408_320))
    evidence = Evidence(
        Context(TrainConfig(), {}, notices), files=None, data=None, forecast=forecast, captions=()
    )
    precision_suits_the_size(evidence)
    (notice,) = notices.all()
    assert notice.startswith("[flux-precision] mixed_precision = 'no' (default): ")
    assert "take 47.6 GB; recommended: bf16" in notice


@pytest.mark.parametrize(("needed", "codes"), [(3 * 10**12, ["disk-space"]), (10**9, [])])
def test_a_full_disk_is_foreseen(needed: int, codes: list[str]):
    notices = Notices()
    disk = DiskFacts(folder=Path("/data"), needed=needed, free=2 * 10**9)
    disks_have_room(
        Evidence(
            Context(TrainConfig(), {}, notices),
            files=None,
            data=None,
            forecast=SimpleNamespace(disks=(disk,)),
            captions=(),
        )
    )
    assert [code_of(notice) for notice in notices.all()] == codes
    assert all(
        "writes 3000.0 GB to the disk of /data, which has 2.0 GB free" in notice for notice in notices.all()
    )
