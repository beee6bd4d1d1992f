"""From plan to tensors: what a batch holds, and that nothing but the plan and the seed decides it."""

from __future__ import annotations

import pickle
from dataclasses import replace

import pytest
import torch
from picture_files import write_picture
from PIL import Image

from library.config.dataset_keys import KEYS
from library.config.dataset_settings import DatasetSettings, SubsetSettings
from library.data.dataset import TrainingData, load_batches, place_records, read_batch
from library.data.discover import discover
from library.data.plan import MicroBatch, Plan, PlanSettings, Sample
from library.data.readers import CachedLatents, CachedText
from library.errors import DatasetError

SIZES = [(64, 64), (96, 64), (64, 100), (130, 70), (48, 48)]


def make(root, *, seed: int = 3, dataset=None, **options) -> TrainingData:
    """Five small pictures in two buckets."""
    for number, size in enumerate(SIZES):
        write_picture(root / "p" / f"{number}.png", size)
        (root / "p" / f"{number}.txt").write_text(f"tag {number}, b, c, d, e")
    subset = SubsetSettings(
        **{"image_dir": root / "p", "caption_extension": ".txt", "num_repeats": 2, **options}
    )
    settings = DatasetSettings(
        **{
            "resolution": (64, 64),
            "batch_size": 2,
            "enable_bucket": True,
            "min_bucket_reso": 32,
            "max_bucket_reso": 128,
            "bucket_reso_steps": 32,
            "subsets": (subset,),
            **(dataset or {}),
        }
    )
    records = discover((settings,), seed=seed).records
    return TrainingData(
        datasets=(settings,),
        records=records,
        placements=place_records((settings,), records),
        seed=seed,
        max_train_steps=10,
    )


def plan_of(data: TrainingData, units: int = 2) -> Plan:
    options = PlanSettings(
        seed=data.seed,
        batch_sizes=tuple(one.batch_size for one in data.datasets),
        units_per_step=units,
        max_train_epochs=2,
    )
    return Plan(data.planned_images(), options)


def single(data: TrainingData, record: int, visit: int = 0, *, step: int = 0, epoch: int = 0):
    bucket = data.placements[record].bucket
    return read_batch(data, MicroBatch(step, epoch, 0, bucket, (Sample(record, visit),), (1.0,)))


def same(a, b) -> bool:
    fields = ("images", "latents", "mask", "loss_weights", "shares")
    tensors = [(getattr(a, name), getattr(b, name)) for name in fields]
    equal = all((x is None and y is None) or torch.equal(x, y) for x, y in tensors)
    return equal and (a.visits, a.captions) == (b.visits, b.captions)


AUGMENTED = {"flip_aug": True, "random_crop": True, "color_aug": True, "shuffle_caption": True}


def test_batches_do_not_depend_on_workers(tmp_path):
    data = make(tmp_path, **AUGMENTED)
    plan = plan_of(data)
    alone = list(load_batches(data, plan, num_workers=0))
    helped = list(load_batches(data, plan, num_workers=2))
    assert len(alone) == len(load_batches(data, plan)) == plan.total_steps * 2
    assert all(same(a, b) for a, b in zip(alone, helped, strict=True))
    assert len({caption for batch in alone for caption in batch.captions}) > len(SIZES)


def test_a_resumed_stream_goes_on_where_the_other_was(tmp_path):
    data = make(tmp_path, **AUGMENTED)
    plan = plan_of(data)
    whole = list(load_batches(data, plan))
    assert all(
        same(a, b) for a, b in zip(whole[6:], load_batches(data, plan_of(data), start_step=3), strict=True)
    )


def test_world_size_moves_batches_but_does_not_change_them(tmp_path):
    data = make(tmp_path, **AUGMENTED)
    plan = plan_of(data, units=2)
    one = list(load_batches(data, plan))
    two = [list(load_batches(data, plan_of(data, units=2), rank=rank, world=2)) for rank in (0, 1)]
    assert all(
        same(a, b) for a, b in zip(one, [x for pair in zip(*two, strict=True) for x in pair], strict=True)
    )


def test_loading_leaves_the_global_generator_alone(tmp_path):
    data = make(tmp_path)
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    list(load_batches(data, plan_of(data)))
    assert torch.equal(torch.rand(3), expected)


def test_shapes_and_weights(tmp_path):
    data = make(tmp_path)
    shares = 0.0
    for batch in load_batches(data, plan_of(data, units=3)):
        count = len(batch.captions)
        assert batch.images is not None
        assert batch.images.shape[:2] == (count, 3)
        assert (batch.latents, batch.text, batch.mask) == (None, None, None)
        assert batch.images.dtype == batch.shares.dtype == torch.float32
        assert torch.equal(batch.loss_weights, torch.ones(count))
        shares += float(batch.shares.sum())
    assert shares == pytest.approx(plan_of(data, units=3).total_steps)


def test_flip_is_the_mirror_image_of_the_same_crop(tmp_path):
    data = make(tmp_path, flip_aug=True)
    seen = [single(data, 1, visit).images for visit in range(20)]
    plain = single(make(tmp_path), 1).images
    flipped = [torch.equal(one, plain.flip(-1)) for one in seen]
    assert all(torch.equal(one, plain) or mirrored for one, mirrored in zip(seen, flipped, strict=True))
    assert 0 < sum(flipped) < 20


def test_regularisation_images_weigh_the_prior_loss(tmp_path):
    data = make(tmp_path, dataset={"prior_loss_weight": 0.25})
    reg = replace(data, records=tuple(record._replace(is_reg=True) for record in data.records))
    assert single(reg, 0).loss_weights.tolist() == [0.25]


def test_alpha_masks_fill_up_with_ones(tmp_path):
    data = make(tmp_path, alpha_mask=True)
    rgba = Image.open(tmp_path / "p" / "0.png").convert("RGBA")
    rgba.putalpha(Image.linear_gradient("L").resize((64, 64)))
    rgba.save(tmp_path / "p" / "0.png")
    bucket = data.placements[0].bucket
    micro = MicroBatch(0, 0, 0, bucket, (Sample(0, 0), Sample(4, 0)), (0.5, 0.5))
    mask = read_batch(data, micro).mask
    assert mask is not None
    assert mask.shape == (2, 1, 64, 64)
    assert float(mask[0].min()) < 0.01
    assert float(mask[1].min()) == 1.0
    assert single(data, 4).mask is None


def test_mask_pictures_are_framed_like_their_image(tmp_path):
    for number, size in enumerate(SIZES):
        write_picture(tmp_path / "m" / f"{number}.png", size)
    data = make(tmp_path, conditioning_data_dir=tmp_path / "m", random_crop=True, flip_aug=True)
    for visit in range(8):
        for record in range(len(SIZES)):
            batch = single(data, record, visit)
            assert torch.allclose(batch.mask[0, 0], (batch.images[0, 0] + 1) / 2, atol=1e-6)


def test_token_warm_up_uses_the_step(tmp_path):
    data = make(tmp_path, token_warmup_step=0.5)
    lengths = [len(single(data, 0, step=step).captions[0].split(", ")) for step in range(6)]
    assert lengths == [1, 1, 2, 3, 4, 5]


def test_caption_dropout_counts_epochs_from_one(tmp_path):
    data = make(tmp_path, caption_dropout_every_n_epochs=2)
    assert [single(data, 0, epoch=epoch).captions[0] == "" for epoch in range(4)] == [
        False,
        True,
        False,
        True,
    ]


def test_without_buckets_a_random_crop_is_cut_at_the_picture_s_own_scale(tmp_path):
    plain = {"enable_bucket": False, "resolution": (32, 32)}
    data = make(tmp_path, dataset=plain, random_crop=True)
    for visit in range(10):
        row = single(data, 3, visit).images[0, 0, 0]
        step = (row[-1] - row[0]) / 31 * 127.5
        assert float(step) == pytest.approx(255 / 129, abs=0.07)
    scaled = single(make(tmp_path, dataset=plain), 3).images[0, 0, 0]
    assert float((scaled[-1] - scaled[0]) / 31 * 127.5) > 3


def test_face_crops_are_used_without_buckets(tmp_path):
    write_picture(tmp_path / "p" / "me_100_30_20_20.png", (130, 70))
    data = make(
        tmp_path, dataset={"enable_bucket": False, "resolution": (32, 32)}, face_crop_aug_range=(1.5, 1.5)
    )
    index = next(i for i, record in enumerate(data.records) if record.path.stem.startswith("me"))
    image = single(data, index).images[0]
    centre = (float(image[0, 16, 16]) + 1) / 2
    assert centre == pytest.approx(100 / 129, abs=0.02)


def test_an_image_that_cannot_be_read_is_one_sentence_from_a_worker_too(tmp_path):
    data = make(tmp_path)
    (tmp_path / "p" / "3.png").write_bytes(b"gone")
    for workers in (0, 2):
        with pytest.raises(DatasetError) as caught:
            list(load_batches(data, plan_of(data), num_workers=workers))
        assert str(caught.value).startswith(str(tmp_path / "p" / "3.png"))
        assert "Traceback" not in str(caught.value)


def test_an_image_that_changed_its_size_is_refused(tmp_path):
    data = make(tmp_path)
    write_picture(tmp_path / "p" / "0.png", (70, 64))
    with pytest.raises(DatasetError, match="changed its size"):
        single(data, 0)


class Stored:
    """Readers that answer with what they were asked."""

    def caption(self, record, *, visit, step):
        return f"{record.caption} of visit {visit} in step {step}"

    def read(self, record, caption=None, *, bucket=None, flipped=False, mask=False):
        if bucket is not None:
            latents = torch.full((16, bucket[1] // 8, bucket[0] // 8), float(flipped))
            return CachedLatents(
                latents, torch.arange(bucket[0]).repeat(bucket[1], 1).float() if mask else None
            )
        length = 3 if caption is None else 5
        return CachedText(torch.zeros(4), torch.ones(length, 6), torch.ones(length, dtype=torch.int64))


def test_caches_are_read_instead_of_pixels(tmp_path):
    data = make(tmp_path, flip_aug=True, alpha_mask=True, caption_dropout_rate=0.5)
    pixels = [single(data, 0, visit) for visit in range(12)]
    data = replace(data, latents=Stored(), text=Stored())
    for visit, live in enumerate(pixels):
        batch = single(data, 0, visit)
        assert batch.images is None
        assert batch.latents.shape == (1, 16, 8, 8)
        mirrored = bool(batch.latents.mean() == 1)
        assert float(batch.mask[0, 0, 0, 0]) == (63.0 if mirrored else 0.0)
        assert (batch.captions == ("",)) == (live.captions == ("",))
        assert batch.text.t5_hidden.shape[1] == (3 if batch.captions == ("",) else 5)
        assert mirrored == bool(live.images[0, 0, 0, 0] > live.images[0, 0, 0, -1])


def test_shorter_token_sequences_are_filled_with_zeros(tmp_path):
    data = replace(make(tmp_path, caption_dropout_rate=0.5), text=Stored())
    micro = MicroBatch(0, 0, 0, (64, 64), tuple(Sample(0, v) for v in range(8)), (0.1,) * 8)
    text = read_batch(data, micro).text
    assert text.t5_hidden.shape == (8, 5, 6)
    assert set(text.t5_mask.sum(1).tolist()) == {3, 5}
    assert torch.equal(text.t5_hidden[:, :, 0], text.t5_mask.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="page-locked memory needs a CUDA device")
def test_batches_are_pinned_for_a_gpu(tmp_path):
    data = replace(make(tmp_path, alpha_mask=True), latents=Stored(), text=Stored())
    for batch in load_batches(data, plan_of(data)):
        pinned = (batch.latents, batch.mask, batch.shares, batch.loss_weights, batch.text.t5_hidden)
        assert all(tensor.is_pinned() for tensor in pinned)


def test_an_encoder_that_runs_beside_cached_outputs_gets_their_caption(tmp_path):
    data = replace(make(tmp_path, caption_prefix="{a|b}", enable_wildcard=True), text=Stored())
    assert single(data, 0, 7, step=3).captions == ("tag 0, b, c, d, e of visit 7 in step 3",)


def test_any_seed_will_do_for_workers(tmp_path):
    data = make(tmp_path, seed=2**80)
    assert len(next(iter(load_batches(data, plan_of(data)))).visits) > 0


def test_data_can_be_sent_to_a_worker_that_is_not_forked(tmp_path):
    attributes = KEYS["custom_attributes"].reader.read({"a": 1}, "dataset.toml")
    data = make(tmp_path, custom_attributes=attributes)
    assert pickle.loads(pickle.dumps(data)) == data


def test_subsets_that_preserve_the_model_mark_their_samples(tmp_path):
    assert single(make(tmp_path / "plain"), 0).preserve is None
    marked = make(tmp_path / "marked", custom_attributes={"diff_output_preservation": True})
    assert single(marked, 0).preserve.tolist() == [True]
