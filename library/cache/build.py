"""The caching pass: decode ahead in threads, encode in batches of one shape, write each file whole as soon as
it is made.

The device is given the next batches before the last one's latents are read, and files are written in threads, so
that it never waits for a picture or a disk. Killed at any moment, the pass goes on where it was, since what is
written is found valid by the next survey. Encoders are callables, so this module knows no model. Posterior noise is
keyed by the image, never by the run's seed, the rank or the batch: latents are the same however the work was
divided.
"""

from __future__ import annotations

import logging
import os
from collections import ChainMap, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from threading import Lock

import numpy as np
import torch
from torch import Tensor

from library import randomness
from library.cache import latents, text
from library.cache.latents import LatentEntry, LatentNeed, LatentStore
from library.cache.pipeline import IN_FLIGHT, Arriving, Writers, launched_ahead
from library.cache.survey import CacheOptions, Work
from library.cache.text import TextNeed, TextOptions, TextStore
from library.data import images
from library.data.buckets import Size
from library.data.decode import Undecodable, read_picture
from library.data.problems import Problems
from library.data.readers import CachedText
from library.data.records import TextCond
from library.errors import ConfigError
from library.files.atomic import clear_abandoned
from library.randomness import Visit

logger = logging.getLogger(__name__)

EncodeImages = Callable[[Tensor, Tensor], Tensor]  # images [B, 3, H, W], noise [B, 16, h, w] -> [B, 16, h, w]
EncodeCaptions = Callable[[list[str]], TextCond]
_REMEMBERED = (
    64  # captions' outputs kept meanwhile, for others of the same text; up to 8 MB each at 512 tokens
)
_CACHE_SEED = 0  # one draw of the posterior for all runs, or every new seed would make the caches stale
_DECODERS = min(16, os.cpu_count() or 1)
_DECODED_BYTES = 1 << 30  # of pictures decoded ahead


@dataclass(frozen=True, slots=True)
class _Decoded:
    image: Tensor  # [3, H, W]
    mask: Tensor | None  # [H, W]
    noise: Tensor  # [16, h, w]
    mirrored_noise: Tensor | None  # [16, h, w]


@dataclass(frozen=True, slots=True)
class _LaunchedImages:
    """A batch that the device has been given."""

    needs: list[LatentNeed]
    decoded: list[_Decoded]
    latents: Arriving  # plain [B, 16, h, w] and mirrored [M, 16, h, w] of those that want it


class _LaunchedCaptions:
    """Captions that the device has been given."""

    def __init__(self, made: TextCond) -> None:
        self._arriving: Arriving | None = Arriving(made.clip_pooled, made.t5_hidden, made.t5_mask)
        self._kept: list[Tensor] = []
        self._lock = Lock()

    def read(self, number: int) -> CachedText:
        """Outputs of one of them, in float32, or float16 where the encoder gives that, as in Kohya's files."""
        with self._lock:
            if self._arriving is not None:
                self._kept = [tensor.clone() for tensor in self._arriving.wait()]
                self._arriving = None
        pooled, hidden, mask = (tensor[number] for tensor in self._kept)
        return CachedText(_stored(pooled), _stored(hidden), mask.long())


Coming = Callable[[], CachedText]  # one caption's outputs, once they are wanted


def build_latents(
    work: Work[LatentNeed], store: LatentStore, encode: EncodeImages, *, encoder: str, options: CacheOptions
) -> int:
    """Encode all of `work`; returns how many images were encoded.

    An image that cannot be decoded is left for the end, so that all of them are known after one pass. Raises
    DatasetError for them and for a file that cannot be written, ConfigError if the autoencoder gives values that
    are not finite.
    """
    on_disk = set(work.to_write)
    _clear_abandoned(on_disk)
    total = len(work.to_write) + len(work.to_keep)
    done = 0
    problems = Problems()
    batches = _batches([*work.to_write, *work.to_keep], options.batch_size)
    decoded = _decoded_ahead(batches, problems)
    with Writers() as writers:
        for launched in launched_ahead(decoded, lambda pair: _launch_images(*pair, encode)):
            for need, entry in zip(launched.needs, _entries(launched), strict=True):
                if need in on_disk:
                    writers.submit(
                        need.path, partial(latents.write_entries, [(need, entry)], encoder=encoder)
                    )
                else:
                    store.memory[(need.path, need.placement.bucket)] = entry
            done += len(launched.needs)
            if options.progress is not None:
                options.progress(done, total)
    problems.check()
    return done


def build_text(
    work: Work[TextNeed],
    store: TextStore,
    encode: EncodeCaptions,
    *,
    text_options: TextOptions,
    options: CacheOptions,
) -> int:
    """Encode all of `work`; returns how many files' captions were encoded. What a stale file still holds is
    kept, and a caption that several files want is encoded once, unless they lie far apart.
    """
    on_disk = set(work.to_write)
    _clear_abandoned(on_disk)
    needs = [*work.to_write, *work.to_keep]
    remembered = max(_REMEMBERED, 2 * (IN_FLIGHT + 1) * options.batch_size)
    recent: dict[str, Coming] = {}
    done = 0

    def launch(group: list[TextNeed]) -> tuple[list[TextNeed], dict[str, Coming]]:
        nonlocal recent
        wanted = dict.fromkeys(caption for need in group for caption in need.captions)
        present = {caption: store.memory[caption] for caption in wanted if caption in store.memory}
        for need in group:
            if need in on_disk:
                present |= text.still_valid(need, options=text_options)
        held = {caption: partial(_itself, one) for caption, one in present.items()}
        outputs = ChainMap[str, Coming](dict(held), recent)
        missing = [caption for caption in wanted if caption not in outputs]
        outputs |= _launch_captions(missing, encode, options.batch_size)
        coming = {caption: outputs[caption] for caption in wanted}
        recent = dict([*recent.items(), *coming.items()][-remembered:])
        return group, coming

    with Writers() as writers:
        for group, outputs in launched_ahead(_groups(needs, options.batch_size), launch):
            for need in group:
                coming = [outputs[caption] for caption in need.captions]
                if need in on_disk:
                    writers.submit(need.path, partial(_write_text, need, coming, text_options))
                else:
                    made = (text.compacted(one()) for one in coming)
                    store.memory |= dict(zip(need.captions, made, strict=True))
            done += len(group)
            if options.progress is not None:
                options.progress(done, len(needs))
    return done


def _groups(needs: Sequence[TextNeed], size: int) -> Iterator[list[TextNeed]]:
    """Needs in order, as many together as have `size` captions; at least one."""
    group: list[TextNeed] = []
    for need in needs:
        if group and sum(len(one.captions) for one in group) + len(need.captions) > size:
            yield group
            group = []
        group.append(need)
    if group:
        yield group


def _clear_abandoned(needs: Iterable[LatentNeed | TextNeed]) -> None:
    """Remove what a pass that was killed left half written."""
    for folder in {need.path.parent for need in needs}:
        clear_abandoned(folder, ".npz")


def _batches(needs: Sequence[LatentNeed], size: int) -> list[list[LatentNeed]]:
    """Needs of one bucket each, small buckets first."""
    by_bucket: dict[Size, list[LatentNeed]] = {}
    for need in needs:
        by_bucket.setdefault(need.placement.bucket, []).append(need)
    ordered = sorted(by_bucket, key=lambda bucket: (bucket[0] * bucket[1], bucket))
    return [
        by_bucket[bucket][start : start + size]
        for bucket in ordered
        for start in range(0, len(by_bucket[bucket]), size)
    ]


def _decoded_ahead(
    batches: list[list[LatentNeed]], problems: Problems
) -> Iterator[tuple[list[LatentNeed], list[_Decoded]]]:
    """Batches with their pixels, less what cannot be decoded; those that follow are decoded meanwhile."""
    coming: deque[tuple[list[LatentNeed], list[Future[_Decoded | Undecodable]]]] = deque()
    following = iter(batches)
    pool = ThreadPoolExecutor(max_workers=_DECODERS, thread_name_prefix="decoder")

    def submit() -> bool:
        batch = next(following, None)
        if batch is not None:
            coming.append((batch, [pool.submit(_try, need) for need in batch]))
        return batch is not None

    try:
        while coming or submit():
            while _room_for_more([need for batch, _ in coming for need in batch]) and submit():
                pass
            batch, futures = coming.popleft()
            needs, pixels = [], []
            for need, future in zip(batch, futures, strict=True):
                result = future.result()
                if isinstance(result, Undecodable):
                    logger.warning(result)
                    problems.add(result.path, result.what)
                else:
                    needs.append(need)
                    pixels.append(result)
            if needs:
                yield needs, pixels
    finally:
        pool.shutdown(cancel_futures=True)


def _room_for_more(coming: Sequence[LatentNeed]) -> bool:
    """Whether the decoders could run out of work, and memory would not."""
    width, height = coming[-1].placement.bucket
    return len(coming) < 2 * _DECODERS and len(coming) * width * height * 3 * 4 < _DECODED_BYTES


def _try(need: LatentNeed) -> _Decoded | Undecodable:
    try:
        return _decode(need)
    except Undecodable as error:
        return error


def _decode(need: LatentNeed) -> _Decoded:
    """All that encoding one need takes; its alpha mask is all ones for a picture without alpha."""
    picture = read_picture(need.record.path)
    framing = images.frame(need.placement)
    image = images.image_tensor(images.render(picture.rgb, framing, need.interpolation))
    mask = None
    if need.mask and picture.alpha is None:
        mask = torch.ones(image.shape[1:])
    elif need.mask and picture.alpha is not None:
        mask = images.mask_tensor(images.render(picture.alpha, framing, need.interpolation))[0]
    noise = posterior_noise(need, "posterior")
    return _Decoded(image, mask, noise, posterior_noise(need, "posterior, mirrored") if need.flip else None)


def _launch_images(needs: list[LatentNeed], decoded: list[_Decoded], encode: EncodeImages) -> _LaunchedImages:
    """Give the device one batch; mirror images are encoded on their own, with their own noise."""
    made = [encode(_stacked([one.image for one in decoded]), _stacked([one.noise for one in decoded]))]
    mirrored = [(one.image.flip(-1), one.mirrored_noise) for one in decoded if one.mirrored_noise is not None]
    if mirrored:
        made.append(encode(*(_stacked(column) for column in zip(*mirrored, strict=True))))
    return _LaunchedImages(needs, decoded, Arriving(*(one.detach().float() for one in made)))


def _stacked(tensors: Sequence[Tensor]) -> Tensor:
    """[B, ...]; one alone is not copied."""
    return tensors[0][None] if len(tensors) == 1 else torch.stack(list(tensors))


def _entries(launched: _LaunchedImages) -> Iterator[LatentEntry]:
    """The batch's entries, as soon as the device has made them."""
    plain, *rest = (iter(tensor) for tensor in launched.latents.wait())
    for need, decoded in zip(launched.needs, launched.decoded, strict=True):
        made = [next(plain), *(next(rest[0]) for _ in range(need.flip))]
        if not all(bool(torch.isfinite(one).all()) for one in made):
            raise ConfigError(
                f"the autoencoder gave values that are not finite for {need.record.path}; give --no_half_vae"
            )
        kept = [one.clone() for one in made]
        yield LatentEntry(kept[0], kept[1] if need.flip else None, decoded.mask)


def posterior_noise(need: LatentNeed, purpose: str) -> Tensor:
    """[16, h, w] float32, standard normal, for sampling the autoencoder's posterior once."""
    width, height = need.placement.bucket
    rng = randomness.generator(_CACHE_SEED, Visit(need.record.key, 0), purpose)
    shape = (latents.CHANNELS, height // latents.CELL, width // latents.CELL)
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _launch_captions(wanted: list[str], encode: EncodeCaptions, batch_size: int) -> dict[str, Coming]:
    """Give the device captions; their outputs by caption."""
    outputs: dict[str, Coming] = {}
    for start in range(0, len(wanted), batch_size):
        chunk = wanted[start : start + batch_size]
        launched = _LaunchedCaptions(encode(chunk))
        outputs |= {caption: partial(launched.read, number) for number, caption in enumerate(chunk)}
    return outputs


def _itself(held: CachedText) -> CachedText:
    return held


def _write_text(need: TextNeed, coming: Sequence[Coming], options: TextOptions) -> None:
    text.write_file(need, [one() for one in coming], options=options)


def _stored(tensor: Tensor) -> Tensor:
    return tensor if tensor.dtype == torch.float16 else tensor.float()
