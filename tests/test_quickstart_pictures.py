"""The pictures, prompts and options of the quick start are complete, small and licensed."""

import re
from pathlib import Path

import pytest
import toml
from PIL import Image, ImageOps

from library.config.prompts import load_prompts

CONFIGS = Path(__file__).parents[1] / "configs"
TRAIN = CONFIGS / "quickstart/train"
PICTURES = sorted(path for path in TRAIN.rglob("*") if path.suffix in (".webp", ".jpg", ".png"))


def test_sixteen_pictures_in_folders_with_repeats_under_three_megabytes():
    folders = sorted(path.name for path in TRAIN.iterdir() if path.is_dir())
    assert folders == ["10_fluent3d", "4_photo"]
    assert len(PICTURES) == 16
    shipped = (path for path in TRAIN.rglob("*") if path.is_file() and path.suffix != ".npz")
    assert sum(path.stat().st_size for path in shipped) < 3 * 2**20


@pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.name)
def test_each_picture_is_sound_and_has_a_caption_and_a_licence(path):
    with Image.open(path) as picture:
        picture.load()
        assert 256 <= max(picture.size) <= 512
        assert min(picture.size) >= 256
    caption = path.with_suffix(".txt").read_text(encoding="utf-8").strip()
    style = "a fluent3d picture of " if path.parent.name == "10_fluent3d" else "a photo of "
    assert caption.startswith(style)
    assert "\n" not in caption
    assert re.search(rf"^\| {path.name} \|", (TRAIN / "LICENSES.md").read_text(), re.MULTILINE)


def test_one_picture_is_stored_turned_and_the_shapes_differ():
    turned = [path.name for path in PICTURES if Image.open(path).getexif().get(0x0112, 1) != 1]
    assert turned == ["rocket.jpg"]
    with Image.open(TRAIN / "4_photo/rocket.jpg") as rocket:
        assert rocket.getexif()[0x0112] == 6
        assert rocket.size == (342, 512)
        assert ImageOps.exif_transpose(rocket).size == (512, 342)
    ratios = {round(width / height, 1) for width, height in (Image.open(path).size for path in PICTURES)}
    assert len(ratios) >= 4


def test_some_pictures_are_transparent():
    alphas = [Image.open(path).getchannel("A") for path in PICTURES if Image.open(path).mode == "RGBA"]
    assert len(alphas) == 12
    assert all(alpha.getextrema() == (0, 255) for alpha in alphas)


def test_the_config_points_at_what_is_there():
    options = {}
    for section in toml.loads((CONFIGS / "quickstart.toml").read_text()).values():
        assert not options.keys() & section.keys()
        options |= section
    root = CONFIGS.parent
    assert (root / options["train_data_dir"]).samefile(TRAIN)
    loaded = load_prompts(root / options["sample_prompts"])
    assert loaded.notices == ()
    assert [(one.width, one.height, one.seed) for one in loaded.prompts] == [(128, 128, 1), (128, 128, 2)]
