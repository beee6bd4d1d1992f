"""Encoding ahead and writing in threads: order, and what is left on the disk when something fails."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
import torch
from cache_data import ToyImages, ToyText, cache_latents, cache_text, data_of, dataset, write_pictures

from library.cache import latents, npz
from library.cache.pipeline import IN_FLIGHT, Arriving, Writers, launched_ahead
from library.errors import ConfigError, DatasetError


def test_tasks_are_launched_ahead_of_their_results():
    launched = []
    results = launched_ahead(range(6), lambda task: launched.append(task) or task)
    given = [(result, len(launched)) for result in results]
    assert given == [(task, min(6, task + 1 + IN_FLIGHT)) for task in range(6)]


def test_what_was_launched_before_an_error_is_given_out():
    def launch(task):
        if task == 4:
            raise KeyboardInterrupt
        return task

    results = launched_ahead(range(6), launch)
    assert [next(results) for _ in range(4)] == [0, 1, 2, 3]
    with pytest.raises(KeyboardInterrupt):
        next(results)


def test_writes_of_one_file_are_in_order_and_others_go_on_beside_them(tmp_path):
    written: list[tuple[str, int]] = []
    threads = set()

    def write(name, number):
        def act():
            threads.add(threading.get_ident())
            time.sleep(0.002)
            written.append((name, number))

        return act

    with Writers() as writers:
        for number in range(10):
            for name in "abcdefgh":
                writers.submit(tmp_path / name, write(name, number))
    assert len(written) == 80
    assert len(threads) > 1
    for name in "abcdefgh":
        assert [number for one, number in written if one == name] == list(range(10))


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    def fail():
        raise OSError(28, "No space left on device")

    def both():
        with Writers() as writers:
            writers.submit(tmp_path / "a.npz", lambda: None)
            writers.submit(tmp_path / "b.npz", fail)

    with pytest.raises(DatasetError, match=r"b\.npz cannot be written .*No space left.*cache in memory"):
        both()


def test_a_disk_that_fills_up_ends_the_pass_and_loses_nothing(tmp_path, monkeypatch):
    write_pictures(tmp_path / "p", [(64, 64)] * 60)
    data = data_of(dataset(tmp_path / "p"))
    real, left = npz.write_arrays, threading.Semaphore(7)

    def full(path: Path, arrays):
        if not left.acquire(blocking=False):
            raise OSError(28, "No space left on device", str(path))
        real(path, arrays)

    with monkeypatch.context() as patched:
        patched.setattr(npz, "write_arrays", full)
        with pytest.raises(DatasetError, match="free space there or cache in memory"):
            cache_latents(data)
    assert len(list((tmp_path / "p").glob("*.npz"))) == 7
    _, encode, _ = cache_latents(data)
    assert encode.num_images == 53


def test_values_that_are_not_finite_keep_what_came_before(tmp_path):
    write_pictures(tmp_path / "p", [(64, 64)] * 6)
    toy = ToyImages()

    def broken(images, noise):
        made = toy(images, noise)
        return made / 0 if len(toy.batches) == 3 else made

    with pytest.raises(ConfigError, match="not finite"):
        cache_latents(data_of(dataset(tmp_path / "p")), encode=broken, batch_size=1)
    assert len(list((tmp_path / "p").glob("*.npz"))) == 2


def test_a_caption_wanted_again_while_it_is_on_its_way_is_encoded_once(tmp_path):
    write_pictures(tmp_path / "p", [(64, 64)] * 12)
    for number in range(12):
        (tmp_path / "p" / f"{number}.txt").write_text(f"caption {number % 2}")
    store, encode, _ = cache_text(data_of(dataset(tmp_path / "p")), batch_size=1)
    assert sorted(encode.asked) == ["caption 0", "caption 1"]
    kept, encode, _ = cache_text(
        data_of(dataset(tmp_path / "p")), encode=ToyText(), to_disk=False, batch_size=1
    )
    assert sorted(encode.asked) == ["caption 0", "caption 1"]
    for record in data_of(dataset(tmp_path / "p")).records:
        both = [one.read(record, record.caption).t5_hidden for one in (store, kept)]
        assert torch.equal(*both)


def test_two_resolutions_of_one_picture_are_written_one_after_the_other(tmp_path):
    """Both entries lie in one file, which each write reads and writes anew."""
    write_pictures(tmp_path / "p", [(128, 128)] * 12)
    data = data_of(dataset(tmp_path / "p"), dataset(tmp_path / "p", resolution=(96, 96)))
    cache_latents(data, batch_size=4)
    for need in latents.latent_needs(data):
        assert latents.check_file([need], encoder="ae") == [latents.Entry.VALID]


@pytest.mark.parametrize("device", ["cpu", *(["cuda"] if torch.cuda.is_available() else [])])
def test_what_arrives_is_what_the_device_had_then(device):
    tensor = torch.arange(6.0, device=device)
    arriving = Arriving(tensor, tensor * 2)
    first, second = arriving.wait()
    assert (first.device.type, second.tolist()) == ("cpu", [0, 2, 4, 6, 8, 10])
