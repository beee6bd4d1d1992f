"""The caching pass: decode ahead in threads, encode in batches of one shape, write each file whole as soon as
it is made.

Killed at any moment, the pass goes on where it was, since what is written is found valid by the next survey.
Encoders are callables, so this module knows no model and no device. Posterior noise is keyed by the image,
never by the run's seed, the rank or the batch: latents are the same however the work was divided.
"""

from __future__ import annotations

import logging
import os
from collections import ChainMap
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library import randomness
from library.cache import latents, text
from library.cache.latents import LatentEntry, LatentNeed, LatentStore
from library.cache.survey import CacheOptions, Work
from library.cache.text import TextNeed, TextOptions, TextStore
from library.data import images
from library.data.buckets import Size
from library.data.decode import Undecodable, read_picture
from library.data.problems import Problems
from library.data.readers import CachedText
from library.data.records import TextCond
from library.errors import ConfigError, DatasetError
from library.files.atomic import clear_abandoned
from library.randomness import Visit

logger = logging.getLogger(__name__)

EncodeImages = Callable[[Tensor, Tensor], Tensor]  # images [B, 3, H, W], noise [B, 16, h, w] -> [B, 16, h, w]
EncodeCaptions = Callable[[list[str]], TextCond]
_REMEMBERED = 64  # captions' outputs kept meanwhile, for others of the same text; 8 MB each at 512 tokens
_CACHE_SEED = 0  # one draw of the posterior for all runs, or every new seed would make the caches stale


@dataclass(frozen=True, slots=True)
class _Decoded:
    image: Tensor  # [3, H, W]
    mask: Tensor | None  # [H, W]


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
    for batch, decoded in _decoded_ahead(batches, problems):
        for need, entry in zip(batch, _encode_batch(batch, decoded, encode), strict=True):
            if need in on_disk:
                with _writing(need.path):
                    latents.write_entries([(need, entry)], encoder=encoder)
            else:
                store.memory[(need.path, need.placement.bucket)] = entry
        done += len(batch)
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
    recent: dict[str, CachedText] = {}
    done = 0
    for group in _groups(needs, options.batch_size):
        outputs = ChainMap[str, CachedText]({}, recent, store.memory)
        for need in group:
            if need in on_disk:
                outputs |= text.still_valid(need, options=text_options)
        wanted = dict.fromkeys(caption for need in group for caption in need.captions)
        missing = [caption for caption in wanted if caption not in outputs]
        outputs |= _encode_captions(missing, encode, options.batch_size)
        for need in group:
            if need in on_disk:
                with _writing(need.path):
                    text.write_file(need, [outputs[c] for c in need.captions], options=text_options)
            else:
                store.memory |= {caption: text.compacted(outputs[caption]) for caption in need.captions}
        recent = dict([*recent.items(), *((caption, outputs[caption]) for caption in wanted)][-_REMEMBERED:])
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


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DatasetError(
            f"the cache file {path} cannot be written ({error}); free space there or cache in memory"
        ) from error


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
    """Batches with their pixels, less what cannot be decoded; the next one is decoded while the caller encodes
    this one.
    """
    with ThreadPoolExecutor(max_workers=min(16, os.cpu_count() or 1)) as pool:

        def submit(number: int) -> list[Future[_Decoded | Undecodable]]:
            return [pool.submit(_try, need) for need in batches[number]] if number < len(batches) else []

        coming = submit(0)
        for number, batch in enumerate(batches):
            present, coming = coming, submit(number + 1)
            needs, pixels = [], []
            for need, future in zip(batch, present, strict=True):
                result = future.result()
                if isinstance(result, Undecodable):
                    logger.warning(result)
                    problems.add(result.path, result.what)
                else:
                    needs.append(need)
                    pixels.append(result)
            if needs:
                yield needs, pixels


def _try(need: LatentNeed) -> _Decoded | Undecodable:
    try:
        return _decode(need)
    except Undecodable as error:
        return error


def _decode(need: LatentNeed) -> _Decoded:
    """Pixels of one need, and its alpha mask, all ones for a picture without alpha."""
    picture = read_picture(need.record.path)
    framing = images.frame(need.placement)
    image = images.image_tensor(images.render(picture.rgb, framing, need.interpolation))
    if not need.mask:
        return _Decoded(image, None)
    if picture.alpha is None:
        return _Decoded(image, torch.ones(image.shape[1:]))
    return _Decoded(image, images.mask_tensor(images.render(picture.alpha, framing, need.interpolation))[0])


def _encode_batch(
    batch: list[LatentNeed], decoded: list[_Decoded], encode: EncodeImages
) -> list[LatentEntry]:
    """Entries of one batch; mirror images are encoded on their own, with their own noise."""
    plain = _encode(batch, [one.image for one in decoded], encode, purpose="posterior")
    mirrored = [number for number, need in enumerate(batch) if need.flip]
    flipped: dict[int, Tensor] = {}
    if mirrored:
        pixels = [decoded[number].image.flip(-1) for number in mirrored]
        made = _encode([batch[number] for number in mirrored], pixels, encode, purpose="posterior, mirrored")
        flipped = dict(zip(mirrored, made, strict=True))
    return [
        LatentEntry(plain[number], flipped.get(number), decoded[number].mask) for number in range(len(batch))
    ]


def _encode(
    needs: Sequence[LatentNeed], pixels: list[Tensor], encode: EncodeImages, *, purpose: str
) -> list[Tensor]:
    """Latents [16, h, w] float32 on the CPU, one for each need."""
    noise = torch.stack([posterior_noise(need, purpose) for need in needs])
    made = encode(torch.stack(pixels), noise).detach().to("cpu", torch.float32)
    for need, one in zip(needs, made, strict=True):
        if not torch.isfinite(one).all():
            raise ConfigError(
                f"the autoencoder gave values that are not finite for {need.record.path}; give --no_half_vae"
            )
    return [one.clone() for one in made]


def posterior_noise(need: LatentNeed, purpose: str) -> Tensor:
    """[16, h, w] float32, standard normal, for sampling the autoencoder's posterior once."""
    width, height = need.placement.bucket
    rng = randomness.generator(_CACHE_SEED, Visit(need.record.key, 0), purpose)
    shape = (latents.CHANNELS, height // latents.CELL, width // latents.CELL)
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))


def _encode_captions(wanted: list[str], encode: EncodeCaptions, batch_size: int) -> dict[str, CachedText]:
    """Outputs by caption, in float32, or float16 where the encoder gives that, as in Kohya's files."""
    outputs: dict[str, CachedText] = {}
    for start in range(0, len(wanted), batch_size):
        chunk = wanted[start : start + batch_size]
        made = encode(chunk)
        for number, caption in enumerate(chunk):
            outputs[caption] = CachedText(
                _stored(made.clip_pooled[number]),
                _stored(made.t5_hidden[number]),
                made.t5_mask[number].detach().to("cpu", torch.int64).clone(),
            )
    return outputs


def _stored(tensor: Tensor) -> Tensor:
    kept = tensor.detach().to("cpu")
    return kept.clone() if kept.dtype == torch.float16 else kept.float().clone()
