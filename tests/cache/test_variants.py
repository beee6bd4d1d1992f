"""Which captions are encoded ahead and which visit trains with which."""

from __future__ import annotations

import os
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from cache_data import ToyText, cache_text, data_of, dataset, planned, write_pictures

from library.cache import npz
from library.cache.survey import check_memory, check_space
from library.cache.text import OutputSize, TextNeed
from library.data.dataset import TrainingData, load_batches
from library.data.plan import Plan, PlanSettings
from library.errors import ConfigError, DatasetError

TAGS = "a0, b1, c2, d3, e4, f5, g6, h7"
EPOCHS = 6


@pytest.fixture
def folder(tmp_path) -> Path:
    write_pictures(tmp_path / "p")
    for number in range(3):
        (tmp_path / "p" / f"{number}.txt").write_text(f"{TAGS}, n{number}")
    return tmp_path / "p"


def plan_of(data: TrainingData, epochs: int = EPOCHS) -> Plan:
    return Plan(
        data.planned_images(),
        PlanSettings(seed=data.seed, batch_sizes=(2,), units_per_step=1, max_train_epochs=epochs),
    )


def made(folder: Path, epochs: int = EPOCHS, seed: int = 0, **options) -> TrainingData:
    data = data_of(dataset(folder, num_repeats=2, **options), seed=seed)
    return replace(data, max_train_steps=plan_of(data, epochs).total_steps)


def captions_by_visit(data: TrainingData) -> dict[tuple[str, int], str]:
    return {
        tuple(visit): caption
        for batch in load_batches(data, plan_of(data))
        for visit, caption in zip(batch.visits, batch.captions, strict=True)
    }


def cached(data: TrainingData, most: int) -> TrainingData:
    return replace(data, text=planned(data, most=most, epochs=EPOCHS)[1])


class Silent:
    """A store whose outputs do not matter."""

    def __init__(self, store) -> None:
        self.caption = store.caption

    def read(self, record, caption):
        made = ToyText()([caption or ""])
        return type("Made", (), {k: getattr(made, k)[0] for k in ("clip_pooled", "t5_hidden", "t5_mask")})


def trained(data: TrainingData, most: int) -> dict[tuple[str, int], str]:
    return captions_by_visit(replace(data, text=Silent(cached(data, most).text)))


SHUFFLED = {"shuffle_caption": True, "keep_tokens": 1}


def test_as_many_variants_as_visits_train_on_the_captions_of_a_run_without_cache(folder):
    data = made(folder, **SHUFFLED, token_warmup_step=0.5, caption_dropout_rate=0.3)
    assert trained(data, 2 * EPOCHS) == captions_by_visit(data)


def test_the_first_visits_have_their_own_captions_and_later_ones_take_turns(folder):
    live, seen = captions_by_visit(made(folder, **SHUFFLED)), trained(made(folder, **SHUFFLED), 5)
    assert seen == {(key, visit): live[key, visit % 5] for key, visit in live}


def test_dropped_visits_are_those_of_a_run_without_cache(folder):
    data = made(folder, **SHUFFLED, caption_dropout_rate=0.3, caption_dropout_every_n_epochs=4)
    live, seen = captions_by_visit(data), trained(data, 5)
    assert 0 < sum(not caption for caption in seen.values()) < len(seen)
    for (key, visit), caption in seen.items():
        assert (caption == "") == (live[key, visit] == "")
        if visit < 5:
            assert caption == live[key, visit]
    assert {len(need.captions) for need in cache_text(data, most=5, epochs=EPOCHS)[2].to_write} == {5, 1}


@pytest.mark.parametrize("most", [1, 2, 3, 8])
def test_token_warm_up_grows_and_arrives(folder, most):
    data = made(folder, token_warmup_step=0.5, shuffle_caption=True)
    end = plan_of(data).total_steps // 2
    steps = {
        (data.records[sample.record].key, sample.visit): micro.step
        for micro in plan_of(data).micro_batches(rank=0, world=1)
        for sample in micro.samples
    }
    seen, live = trained(data, most), captions_by_visit(data)
    assert len(set(seen.values())) <= 3 * most
    counts = defaultdict(list)
    for (key, visit), caption in sorted(seen.items(), key=lambda item: steps[item[0]]):
        count = len(caption.split(", "))
        assert count >= len(live[key, visit].split(", "))
        counts[key].append(count)
        if steps[key, visit] >= end:
            assert count == 9
    for of_image in counts.values():
        assert of_image == sorted(of_image)
    if most > 2:
        assert all(of_image[0] < 9 for of_image in counts.values())


def test_a_warm_up_longer_than_the_run_has_its_last_caption_at_the_end(folder):
    data = made(folder, token_warmup_step=1000, shuffle_caption=True)
    live = captions_by_visit(data)
    for key in {key for key, _ in live}:
        own = [visit for k, visit in live if k == key]
        longest = max(len(live[key, v].split(", ")) for v in own)
        last = {len(caption.split(", ")) for (k, _), caption in trained(data, 1).items() if k == key}
        assert last == {longest}


def test_what_does_not_vary_is_encoded_once(folder):
    assert [len(need.captions) for need in planned(made(folder, caption_prefix="x"))[0]] == [1, 1, 1]
    for number in range(3):
        (folder / f"{number}.txt").write_text("one tag")
    needs, _ = planned(made(folder, shuffle_caption=True))
    assert [need.captions for need in needs] == [("one tag",)] * 3
    assert cache_text(made(folder, shuffle_caption=True))[1].asked == ["one tag"]  # of all three


@pytest.mark.parametrize("to_disk", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_every_visit_reads_the_outputs_of_its_caption(folder, to_disk, dtype):
    data = made(folder, **SHUFFLED, caption_dropout_rate=0.3)
    encode = ToyText(dtype=getattr(torch, dtype))
    store, _, _ = cache_text(data, encode=encode, to_disk=to_disk, most=6, epochs=EPOCHS)
    assert len(encode.asked) == len(set(encode.asked)) == 3 * 6 + 1
    for batch in load_batches(replace(data, text=store), plan_of(data)):
        expected = encode(list(batch.captions))
        assert batch.text.t5_hidden.dtype == torch.float32
        assert torch.equal(batch.text.t5_hidden, expected.t5_hidden.float())
        assert torch.equal(batch.text.clip_pooled, expected.clip_pooled.float())


def test_further_captions_take_half_the_room_of_a_bfloat16_encoder(folder):
    data = made(folder, **SHUFFLED)
    cache_text(data, encode=ToyText(dtype=torch.bfloat16), most=3)
    arrays = npz.read_all(folder / "0_flux_te.npz")
    kinds = sorted(str(array.dtype) for name, array in arrays.items() if name.startswith("t5_out"))
    assert kinds == ["float32", "int16", "int16"]
    (need,) = [need for need in planned(data, most=3)[0] if os.path.basename(need.base) == "0"]
    expected = sum(array.nbytes for name, array in arrays.items() if name != "polyrank_captions") - 1
    assert OutputSize(3, 5, 4, value_bytes=2).on_disk([need]) == expected


def test_only_what_a_changed_number_or_caption_adds_is_encoded(folder):
    data = made(folder, **SHUFFLED)
    first = cache_text(data, most=3, epochs=EPOCHS)[1].asked
    assert cache_text(data, most=3, epochs=EPOCHS)[1].asked == []
    more = cache_text(data, most=5, epochs=EPOCHS)[1].asked
    assert len(more) == 3 * 2
    assert not set(more) & set(first)
    assert cache_text(data, most=4, epochs=EPOCHS)[1].asked == []
    (folder / "1.txt").write_text("x, y, z")
    changed = cache_text(made(folder, **SHUFFLED), most=3, epochs=EPOCHS)[1].asked
    assert set(changed) == {"x, y, z", "x, z, y"}
    assert cache_text(made(folder, seed=1, **SHUFFLED), most=3, epochs=EPOCHS)[1].asked


def test_room_that_is_too_small_is_told_before_anything_is_encoded(tmp_path):
    need = TextNeed(str(tmp_path / "a"), ("x",))
    check_space([(need.path, 1000)], "text_cache_variants")
    with pytest.raises(DatasetError, match=r"need about 1000000000000 MB.*lower text_cache_variants"):
        check_space([(need.path, 10**18)], "text_cache_variants")
    check_memory(1000, "text_cache_variants")
    with pytest.raises(ConfigError, match=r"about 1000000000000 MB of memory.*cache on disk"):
        check_memory(10**18, "text_cache_variants")
