"""The text cache: Kohya's format, captions that change, dropout, datasets that differ about one caption."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from cache_data import TEXT, ToyText, cache_text, data_of, dataset, planned, write_pictures

from library.cache import npz
from library.cache.text import Entry, check_file
from library.data.dataset import read_batch
from library.data.plan import MicroBatch, Sample
from library.errors import DatasetError


@pytest.fixture
def folder(tmp_path) -> Path:
    write_pictures(tmp_path / "p")
    return tmp_path / "p"


def states(data, options=TEXT, **more) -> list[Entry]:
    return [check_file(need, options=options, **more) for need in planned(data)[0]]


def value(caption: str) -> float:
    return float(sum(map(ord, caption)))


def test_files_are_kohyas(folder):
    cache_text(data_of(dataset(folder)))
    arrays = npz.read_all(folder / "0_flux_te.npz")
    arrays.pop("polyrank_captions")
    assert {name: (array.shape, str(array.dtype)) for name, array in arrays.items()} == {
        "l_pooled": ((3,), "float32"),
        "t5_out": ((4, 5), "float32"),
        "txt_ids": ((4, 3), "float32"),
        "t5_attn_mask": ((4,), "int64"),
        "apply_t5_attn_mask": ((), "bool"),
    }
    assert not bool(arrays["apply_t5_attn_mask"])


@pytest.mark.parametrize(("given", "stored"), [("bfloat16", "float32"), ("float16", "float16")])
def test_stored_precision_is_kohyas(folder, given, stored):
    data = data_of(dataset(folder))
    store, _, _ = cache_text(data, encode=ToyText(dtype=getattr(torch, given)))
    assert str(npz.read_all(folder / "0_flux_te.npz")["t5_out"].dtype) == stored
    assert store.read(data.records[0], "caption 0").t5_hidden.dtype == torch.float32


@pytest.mark.parametrize("to_disk", [True, False])
def test_what_is_read_is_what_the_encoder_gave(folder, to_disk):
    data = data_of(dataset(folder, caption_prefix="P"))
    store, encode, _ = cache_text(data, to_disk=to_disk)
    assert bool(list(folder.glob("*.npz"))) == to_disk
    assert sorted(encode.asked) == [f"P caption {number}" for number in range(3)]
    for number, record in enumerate(data.records):
        text = store.read(record, f"P caption {number}")
        assert torch.equal(text.clip_pooled, torch.full((3,), value(f"P caption {number}")))
        assert text.t5_hidden.shape == (4, 5)
        assert text.t5_mask.tolist() == [1] * 4


def test_second_pass_and_stale_entries(folder):
    data = data_of(dataset(folder))
    cache_text(data)
    assert cache_text(data)[1].asked == []
    (folder / "1.txt").write_text("another")
    assert cache_text(data_of(dataset(folder)))[1].asked == ["another"]
    data = data_of(dataset(folder))
    assert states(data) == [Entry.VALID] * 3
    for changed in (
        replace(TEXT, encoder="other"),
        replace(TEXT, t5_length=8),
        replace(TEXT, apply_t5_attn_mask=True),
    ):
        assert states(data, changed) == [Entry.STALE] * 3
    assert states(data, replace(TEXT, encoder="other"), skip_check=True) == [Entry.VALID] * 3


def test_equal_captions_of_a_batch_are_encoded_once(folder):
    for number in range(3):
        (folder / f"{number}.txt").write_text("same")
    assert cache_text(data_of(dataset(folder)), batch_size=3)[1].asked == ["same"]


def test_dropped_captions_read_the_empty_one(folder):
    data = data_of(dataset(folder, caption_dropout_rate=0.5))
    store, encode, _ = cache_text(data)
    assert "" in encode.asked
    assert (folder / "empty-caption_flux_te.npz").is_file()
    data = replace(data, text=store)
    bucket = data.placements[0].bucket
    for visit in range(12):
        batch = read_batch(data, MicroBatch(0, 0, 0, bucket, (Sample(0, visit),), (1.0,)))
        assert batch.text.clip_pooled[0, 0].item() == value(batch.captions[0])
    assert {
        read_batch(data, MicroBatch(0, 0, 0, bucket, (Sample(0, v),), (1.0,))).captions for v in range(12)
    } == {
        ("",),
        ("caption 0",),
    }


def test_without_dropout_no_empty_caption_is_made(folder):
    assert "" not in cache_text(data_of(dataset(folder)))[1].asked


def test_datasets_that_treat_a_caption_differently_share_the_file(folder):
    data = data_of(dataset(folder), dataset(folder, caption_prefix="P"))
    store, encode, _ = cache_text(data)
    assert len(encode.asked) == 6
    assert cache_text(data)[1].asked == []
    read = [
        store.read(record, store.caption(record, visit=0, step=0)).clip_pooled[0].item()
        for record in data.records
    ]
    captions = [f"caption {n}" for n in range(3)]
    assert read == [value(one) for one in captions] + [value("P " + one) for one in captions]
    assert npz.read_all(folder / "0_flux_te.npz")["l_pooled"][0] == value("caption 0")


def kohyas_file(path: Path, *, length: int = 4, apply: bool = False) -> None:
    np.savez(
        path,
        l_pooled=np.full(3, 7, np.float32),
        t5_out=np.full((length, 5), 7, np.float32),
        txt_ids=np.zeros((length, 3), np.float32),
        t5_attn_mask=np.ones(length, np.int64),
        apply_t5_attn_mask=apply,
    )


def test_kohyas_files_are_taken_if_shapes_and_mask_option_fit(folder):
    data = data_of(dataset(folder))
    kohyas_file(folder / "0_flux_te.npz")
    kohyas_file(folder / "1_flux_te.npz", length=5)
    kohyas_file(folder / "2_flux_te.npz", apply=True)
    assert states(data) == [Entry.FOREIGN, Entry.STALE, Entry.STALE]
    store, encode, work = cache_text(data)
    assert encode.asked == ["caption 1", "caption 2"]
    assert len(work.notices) == 2
    assert store.read(data.records[0], "caption 0").clip_pooled.tolist() == [7.0] * 3


def test_kohyas_files_hold_the_caption_as_it_was_read(folder):
    for number in range(3):
        kohyas_file(folder / f"{number}_flux_te.npz")
    assert states(data_of(dataset(folder))) == [Entry.FOREIGN] * 3
    for options in ({"caption_prefix": "P"}, {"trigger_word": "ohwx"}):
        assert states(data_of(dataset(folder, **options))) == [Entry.STALE] * 3
    (folder / "0.txt").write_text("{a|b}")
    assert states(data_of(dataset(folder, enable_wildcard=True))) == [
        Entry.STALE,
        Entry.FOREIGN,
        Entry.FOREIGN,
    ]


def test_damaged_and_lost_files(folder):
    data = data_of(dataset(folder))
    store, _, _ = cache_text(data)
    path = folder / "0_flux_te.npz"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(DatasetError, match=r"0_flux_te\.npz cannot be read"):
        store.read(data.records[0], "caption 0")
    assert cache_text(data)[1].asked == ["caption 0"]


def test_a_flipped_byte_is_found_when_read(folder):
    data = data_of(dataset(folder))
    store, _, _ = cache_text(data)
    path = folder / "0_flux_te.npz"
    content = bytearray(path.read_bytes())
    position = content.find(np.float32(value("caption 0")).tobytes() * 4)
    content[position] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(DatasetError, match="cannot be read any more"):
        store.read(data.records[0], "caption 0")


def test_division_over_ranks_makes_every_file_once(folder):
    data = data_of(dataset(folder, caption_dropout_rate=0.1))
    asked = [cache_text(data, rank=rank, world=2)[1].asked for rank in (0, 1)]
    assert sorted(asked[0] + asked[1]) == ["", "caption 0", "caption 1", "caption 2"]
    assert states(data) == [Entry.VALID] * 4
