"""Reading headers and tensors, writing whole files, hashes."""

from __future__ import annotations

import hashlib

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file as plain_load

from library.files.hashes import adapter_hashes, file_sha256, short_hash
from library.files.safetensors import Reader, load_file, read_header, save_file

TENSORS = {
    "a": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "b": torch.tensor(1.5, dtype=torch.bfloat16),
    "c": torch.tensor([1.0, 448.0]).to(torch.float8_e4m3fn),
    "d": torch.zeros(0, 4, dtype=torch.float16),
    "e": torch.tensor([1, 2], dtype=torch.int64),
}


def same(one, other):
    return one.dtype == other.dtype and one.shape == other.shape and torch.equal(one.float(), other.float())


@pytest.mark.parametrize("mmap", [True, False])
def test_round_trip(tmp_path, mmap):
    path = tmp_path / "deep" / "x.safetensors"
    save_file(path, TENSORS, {"ss_x": "1"})
    header = read_header(path)
    assert header.metadata == {"ss_x": "1"}
    assert {n: (i.torch_dtype, i.shape) for n, i in header.tensors.items()} == {
        n: (t.dtype, tuple(t.shape)) for n, t in TENSORS.items()
    }
    with Reader(header, mmap=mmap) as reader:
        assert all(same(reader.read(name), tensor) for name, tensor in TENSORS.items())
    assert all(same(load_file(path)[name], tensor) for name, tensor in TENSORS.items())
    assert list(path.parent.iterdir()) == [path]


def test_views_of_one_storage_are_saved_apart(tmp_path):
    base = torch.arange(6.0).reshape(2, 3)
    save_file(tmp_path / "x.safetensors", {"a": base, "b": base.view(-1), "t": base.T})
    loaded = plain_load(tmp_path / "x.safetensors")
    assert torch.equal(loaded["a"].flatten(), loaded["b"])
    assert torch.equal(loaded["t"], base.T)


def test_the_longest_name_that_the_disk_takes_can_be_written(tmp_path):
    path = tmp_path / ("名" * 80 + ".safetensors")  # 252 bytes
    save_file(path, {"a": torch.ones(1)})
    assert path.is_file()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    save_file(path, {"a": torch.ones(1)})
    with pytest.raises(TypeError):
        save_file(path, {"a": torch.zeros(1)}, {"number": 1})
    assert plain_load(path)["a"].item() == 1
    assert list(tmp_path.iterdir()) == [path]


def test_adapter_hashes_are_those_of_the_reference():
    tensors = {
        "a.lora_down.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
        "a.alpha": torch.tensor(1.0),
    }
    model = "5f0696bb352d9c66b57b77fc9e311dc32c1fabc9aabcb771ffa5b70bc9902f9d"
    assert adapter_hashes(tensors, {"ss_x": "1", "other": "2"}) == (model, "e3b0c442")
    assert adapter_hashes(dict(reversed(tensors.items())), {}).model == model


def test_legacy_hash_of_a_large_adapter(tmp_path):
    tensors = {"w": torch.randn(600, 1000)}
    save_file(tmp_path / "x.safetensors", tensors, {"ss_a": "1"})
    data = (tmp_path / "x.safetensors").read_bytes()
    expected = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    assert adapter_hashes(tensors, {"ss_a": "1", "sshs_model_hash": "x"}).legacy == expected != "e3b0c442"
    assert short_hash(tmp_path / "x.safetensors") == expected
    assert file_sha256(tmp_path / "x.safetensors") == hashlib.sha256(data).hexdigest()


def test_metadata_is_readable_by_the_library(tmp_path):
    save_file(tmp_path / "x.safetensors", TENSORS, {"k": "v"})
    with safe_open(tmp_path / "x.safetensors", framework="pt") as file:
        assert file.metadata() == {"k": "v"}
