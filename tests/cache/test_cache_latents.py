"""The latents cache: Kohya's format, what makes an entry stale, and passes that are cut short or divided."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_data import ToyImages, cache_latents, data_of, dataset, write_pictures
from PIL import Image

from library.cache import npz
from library.cache.latents import Entry, LatentStore, check_file, latent_needs, latents_path
from library.data.decode import read_picture
from library.data.images import frame, image_tensor, render
from library.errors import ConfigError, DatasetError
from library.files.atomic import temporary_folder


@pytest.fixture
def folder(tmp_path) -> Path:
    write_pictures(tmp_path / "p")
    return tmp_path / "p"


def files_in(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.npz"))}


def states(data, *, encoder: str = "ae", **options) -> list[Entry]:
    return [check_file([need], encoder=encoder, **options)[0] for need in latent_needs(data)]


def test_files_are_kohyas(folder):
    cache_latents(data_of(dataset(folder, flip_aug=True, alpha_mask=True)))
    assert list(files_in(folder)) == ["0_0064x0064_flux.npz", "1_0150x0050_flux.npz", "2_0040x0070_flux.npz"]
    arrays = npz.read_all(folder / "1_0150x0050_flux.npz")
    note = arrays.pop("polyrank_4x12")
    assert npz.unpack_note(note)["encoder"] == "ae"
    assert {name: (array.shape, str(array.dtype)) for name, array in arrays.items()} == {
        "latents_4x12": ((16, 4, 12), "float32"),
        "latents_flipped_4x12": ((16, 4, 12), "float32"),
        "alpha_mask_4x12": ((32, 96), "float32"),
        "original_size_4x12": ((2,), "int64"),
        "crop_ltrb_4x12": ((4,), "float64"),
    }


def test_what_is_read_is_what_the_encoder_gave(folder):
    data = data_of(dataset(folder, flip_aug=True, alpha_mask=True))
    store, _, _ = cache_latents(data)
    for record, placement in zip(data.records, data.placements, strict=True):
        picture = read_picture(record.path)
        image = image_tensor(render(picture.rgb, frame(placement), None))
        mean = torch.nn.functional.avg_pool2d(image[None], 8).repeat(1, 6, 1, 1)[0, :16]
        for flipped in (False, True):
            cached = store.read(record, bucket=placement.bucket, flipped=flipped, mask=True)
            expected = mean.flip(-1) if flipped else mean
            residue = (cached.latents - expected) / 0.1
            assert cached.latents.dtype == torch.float32
            assert abs(float(residue.mean())) < 0.3
            assert 0.8 < float(residue.std()) < 1.2
            alpha = render(picture.alpha, frame(placement), None)
            assert torch.equal(cached.mask, torch.from_numpy(alpha.astype(np.float32) / 255))


def test_memory_holds_the_same_as_files(folder):
    data = data_of(dataset(folder, flip_aug=True))
    kept, encode, work = cache_latents(data, to_disk=False)
    assert not files_in(folder)
    assert (len(work.to_keep), encode.num_images) == (3, 6)
    written, _, _ = cache_latents(data)
    for record, placement in zip(data.records, data.placements, strict=True):
        for flipped in (False, True):
            a, b = (
                s.read(record, bucket=placement.bucket, flipped=flipped, mask=False) for s in (kept, written)
            )
            assert torch.equal(a.latents, b.latents)
            assert a.latents.dtype == torch.float32


def test_a_second_pass_has_nothing_to_do(folder):
    data = data_of(dataset(folder))
    cache_latents(data)
    before = files_in(folder)
    _, encode, work = cache_latents(data)
    assert (encode.batches, work.to_write, work.notices) == ([], (), ())
    assert files_in(folder) == before


def test_batches_are_of_one_bucket_and_at_most_the_size(tmp_path):
    write_pictures(tmp_path / "p", [(64, 64)] * 5 + [(150, 50)] * 3)
    done = []
    _, encode, _ = cache_latents(
        data_of(dataset(tmp_path / "p")), batch_size=2, progress=lambda *numbers: done.append(numbers)
    )
    assert sorted(shape[0] for shape in encode.batches) == [1, 1, 2, 2, 2]
    assert done[-1] == (8, 8)
    assert [count for count, _ in done] == sorted(count for count, _ in done)


def test_division_over_ranks_changes_no_byte_of_the_latents(tmp_path):
    sizes = [(64, 64), (150, 50), (40, 70), (64, 64), (50, 150)]
    for name in ("a", "b"):
        write_pictures(tmp_path / name / "p", sizes)
    cache_latents(data_of(dataset(tmp_path / "a" / "p", flip_aug=True)), batch_size=4)
    divided = data_of(dataset(tmp_path / "b" / "p", flip_aug=True))
    counts = [len(cache_latents(divided, rank=rank, world=3, batch_size=1)[2].to_write) for rank in range(3)]
    assert sorted(counts) == [1, 2, 2]
    for path in (tmp_path / "a" / "p").glob("*.npz"):
        mine, theirs = npz.read_all(path), npz.read_all(tmp_path / "b" / "p" / path.name)
        assert mine.keys() == theirs.keys()
        for name in mine:
            assert name.startswith("polyrank") or np.array_equal(mine[name], theirs[name])


def test_an_interrupted_pass_goes_on(folder):
    data = data_of(dataset(folder))
    with pytest.raises(KeyboardInterrupt):
        cache_latents(data, encode=ToyImages(fail_after=2), batch_size=1)
    assert len(files_in(folder)) == 2
    assert not list(folder.glob(".*"))
    _, encode, _ = cache_latents(data)
    assert encode.num_images == 1
    assert states(data) == [Entry.VALID] * 3


def test_what_a_killed_pass_left_goes_once_nobody_can_be_writing_it(folder):
    old, new, other = (temporary_folder(folder / name) for name in ("a_flux.npz", "b_flux.npz", "c.txt"))
    for one in (old, other):
        os.utime(one, (time.time() - 4000,) * 2)
    cache_latents(data_of(dataset(folder)))
    assert [one.exists() for one in (old, new, other)] == [False, True, True]


def test_a_killed_writer_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.npz"
    npz.write_arrays(path, {"x": np.zeros(200_000)})
    program = (
        "import sys, itertools, numpy as np; from pathlib import Path; from library.cache import npz\n"
        "for n in itertools.count(1):\n"
        "    npz.write_arrays(Path(sys.argv[1]), {'x': np.full(200_000, n)}); print(n, flush=True)\n"
    )
    for lines in (1, 3, 4):
        writer = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE)
        for _ in range(lines):
            assert writer.stdout.readline()
        writer.kill()
        writer.communicate()
        assert len(set(npz.read_arrays(path, ["x"])["x"].tolist())) == 1


def test_only_what_changed_is_made_anew(folder):
    data = data_of(dataset(folder))
    cache_latents(data)
    path = folder / "1.png"
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 255
    Image.fromarray(pixels).save(path)
    assert states(data) == [Entry.VALID, Entry.STALE, Entry.VALID]
    _, encode, work = cache_latents(data)
    assert encode.num_images == 1
    assert "1 cached latents fit no longer" in work.notices[0]
    assert states(data) == [Entry.VALID] * 3


def test_a_touched_file_of_the_same_bytes_stays_valid(folder):
    data = data_of(dataset(folder))
    cache_latents(data)
    os.utime(folder / "0.png", (1, 1))
    assert states(data) == [Entry.VALID] * 3


def test_another_encoder_or_way_to_the_pixels_is_noticed(folder):
    data = data_of(dataset(folder))
    cache_latents(data)
    assert states(data, encoder="other") == [Entry.STALE] * 3
    assert states(data, encoder="other", skip_check=True) == [Entry.VALID] * 3
    assert states(data_of(dataset(folder, resize_interpolation="lanczos"))).count(Entry.STALE) >= 2
    assert states(data_of(dataset(folder, flip_aug=True))) == [Entry.STALE] * 3
    assert states(data_of(dataset(folder, alpha_mask=True))) == [Entry.STALE] * 3


def test_a_mask_that_is_no_longer_asked_for_is_ignored(folder):
    cache_latents(data_of(dataset(folder, alpha_mask=True)))
    data = data_of(dataset(folder))
    store, encode, _ = cache_latents(data)
    assert encode.batches == []
    read = store.read(data.records[0], bucket=data.placements[0].bucket, flipped=False, mask=False)
    assert read.mask is None


@pytest.mark.parametrize("damage", ["truncated", "empty", "text"])
def test_damaged_files_are_made_anew(folder, damage):
    data = data_of(dataset(folder))
    cache_latents(data)
    path = latents_path(data.records[0])
    content = path.read_bytes()
    path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"hello"}[damage])
    assert states(data)[0] == Entry.UNREADABLE
    with pytest.raises(DatasetError, match="cannot be read any more"):
        LatentStore().read(data.records[0], bucket=data.placements[0].bucket, flipped=False, mask=False)
    _, _, work = cache_latents(data)
    assert path.name in work.notices[0]
    assert states(data) == [Entry.VALID] * 3


def kohyas_file(record, bucket) -> None:
    """A file as Kohya's trainer writes it."""
    h, w = bucket[1] // 8, bucket[0] // 8
    latents = np.full((16, h, w), 0.5, dtype=np.float32)
    arrays = {"latents": latents, "original_size": np.array(record.size), "crop_ltrb": np.zeros(4)}
    np.savez(latents_path(record), **{f"{name}_{h}x{w}": array for name, array in arrays.items()})


def test_kohyas_files_are_taken_as_they_are(folder):
    data = data_of(dataset(folder))
    for record, placement in zip(data.records, data.placements, strict=True):
        kohyas_file(record, placement.bucket)
    store, encode, work = cache_latents(data)
    assert encode.batches == []
    assert work.notices == ("3 cached latents are another program's and are used, since their shapes fit",)
    read = store.read(data.records[0], bucket=data.placements[0].bucket, flipped=False, mask=False)
    assert torch.equal(read.latents, torch.full((16, 8, 8), 0.5))


def test_kohyas_files_of_pictures_stored_upside_down_are_not(folder):
    exif = Image.Exif()
    exif[0x0112] = 3
    image = Image.open(folder / "0.png").convert("RGB")
    image.save(folder / "0.png", exif=exif)
    data = data_of(dataset(folder))
    kohyas_file(data.records[0], data.placements[0].bucket)
    assert states(data)[0] == Entry.STALE


def test_a_longer_name_is_not_mistaken_for_a_shorter_one(tmp_path):
    write_pictures(tmp_path / "p", [(64, 64)] * 12)
    data = data_of(dataset(tmp_path / "p"))
    ten = next(record for record in data.records if record.path.stem == "10")
    kohyas_file(ten, (64, 64))
    found = dict(zip((record.path.stem for record in data.records), states(data), strict=True))
    assert found.pop("10") == Entry.FOREIGN
    assert set(found.values()) == {Entry.MISSING}


def test_two_resolutions_share_a_file(folder):
    data = data_of(dataset(folder), dataset(folder, resolution=(96, 96), flip_aug=True))
    store, _, _ = cache_latents(data)
    assert len(files_in(folder)) == 3
    for record, placement in zip(data.records, data.placements, strict=True):
        latents = store.read(record, bucket=placement.bucket, flipped=False, mask=False).latents
        assert latents.shape == (16, placement.bucket[1] // 8, placement.bucket[0] // 8)
    assert states(data) == [Entry.VALID] * 6
    np.savez(folder / "extra.npz", x=np.zeros(1))
    _, encode, _ = cache_latents(data)
    assert encode.batches == []


def test_one_entry_for_two_datasets_alike(folder):
    data = data_of(dataset(folder), dataset(folder, flip_aug=True))
    needs = latent_needs(data)
    assert [need.flip for need in needs] == [True] * 3
    for to_disk in (True, False):
        store, encode, _ = cache_latents(data, to_disk=to_disk)
        assert encode.num_images == 6
        for record, placement in zip(data.records, data.placements, strict=True):
            store.read(record, bucket=placement.bucket, flipped=False, mask=False)


def test_one_entry_wanted_in_two_ways_is_refused(folder):
    with pytest.raises(ConfigError, match="resize_interpolation"):
        latent_needs(data_of(dataset(folder), dataset(folder, resize_interpolation="nearest")))


def test_images_of_one_stem_do_not_share_entries(tmp_path):
    write_pictures(tmp_path / "p", [(64, 64)])
    Image.new("RGB", (64, 64), "red").save(tmp_path / "p" / "0.bmp")
    data = data_of(dataset(tmp_path / "p"))
    cache_latents(data)
    assert list(files_in(tmp_path / "p")) == ["0.png_0064x0064_flux.npz", "0_0064x0064_flux.npz"]
    assert states(data) == [Entry.VALID] * 2


def test_values_that_are_not_finite_stop_the_pass(folder):
    def broken(images, noise):
        return noise / 0

    with pytest.raises(ConfigError, match="--no_half_vae"):
        cache_latents(data_of(dataset(folder)), encode=broken)


def test_the_noise_differs_between_images_and_mirror_images(tmp_path):
    write_pictures(tmp_path / "p", [(64, 64)] * 2)
    data = data_of(dataset(tmp_path / "p", flip_aug=True))
    store, _, _ = cache_latents(data, encode=lambda images, noise: noise)
    drawn = [
        store.read(record, bucket=(64, 64), flipped=flipped, mask=False).latents
        for record in data.records
        for flipped in (False, True)
    ]
    assert len({tuple(one.flatten()[:4].tolist()) for one in drawn}) == 4


def test_a_folder_that_cannot_be_written_is_kept_in_memory():
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "p"
        write_pictures(folder)
        for path in (Path(name), folder):
            path.chmod(0o555)
        root = os.geteuid() == 0
        if root:
            os.seteuid(65534)
        try:
            data = data_of(dataset(folder))
            for rank in (0, 1):
                store, encode, work = cache_latents(data, rank=rank, world=2)
                assert encode.num_images == 3
                assert any("cannot be written" in notice for notice in work.notices)
                for record, placement in zip(data.records, data.placements, strict=True):
                    store.read(record, bucket=placement.bucket, flipped=False, mask=False)
        finally:
            if root:
                os.seteuid(0)
            for path in (Path(name), folder):
                path.chmod(0o755)
        assert not files_in(folder)


def test_every_picture_that_cannot_be_decoded_is_named_after_one_pass(tmp_path):
    write_pictures(tmp_path / "p", [(64, 64)] * 9)
    data = data_of(dataset(tmp_path / "p"))
    for number in range(7):
        path = tmp_path / "p" / f"{number}.png"
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DatasetError) as caught:
        cache_latents(data, batch_size=2)
    said = str(caught.value)
    assert said.startswith("the training data has 7 problems: ")
    assert "0.png cannot be decoded" in said
    assert "and 2 more" in said
    assert list(files_in(tmp_path / "p")) == ["7_0064x0064_flux.npz", "8_0064x0064_flux.npz"]
