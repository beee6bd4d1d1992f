"""Reading ahead gives what reading one tensor at a time gives. On a CPU here."""

from __future__ import annotations

import threading

import pytest
import torch

from library.errors import CheckpointError
from library.files import read_ahead
from library.files.safetensors import load_file, read_header, save_file

CPU = torch.device("cpu")


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two files; reads of 1000 bytes, of which 5000 are in memory ahead."""
    monkeypatch.setattr(read_ahead, "_CHUNK", 1000)
    monkeypatch.setattr(read_ahead, "_AHEAD", 5000)
    torch.manual_seed(0)
    shapes = [(), (0, 3), (7,), (250, 4), (33, 41), (1,)]
    for number, dtype in enumerate((torch.float32, torch.bfloat16)):
        tensors = {f"t{n}": torch.randn(shape).to(dtype) for n, shape in enumerate(shapes)}
        tensors["narrow"] = torch.randn(1001).to(torch.float8_e4m3fn)
        save_file(tmp_path / f"{number}.safetensors", tensors)
    return [tmp_path / "0.safetensors", tmp_path / "1.safetensors"]


def test_tensors_come_in_the_order_asked_for(files):
    headers = [read_header(file) for file in files]
    wanted = [(header, name) for name in headers[0].tensors for header in reversed(headers)]
    kept = {header.path: load_file(header.path) for header in headers}
    read = list(read_ahead.read_ahead(wanted, CPU))
    assert len(read) == 14
    for tensor, (header, name) in zip(read, wanted, strict=True):
        expected = kept[header.path][name]
        assert (tensor.dtype, tensor.shape) == (expected.dtype, expected.shape)
        assert torch.equal(tensor.float(), expected.float())


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_that_still_works_with_memory_it_was_told_to_free(files):
    header = read_header(files[0])
    kept = load_file(header.path)
    device = torch.device("cuda")
    large = torch.randn(4096, 4096, device=device)
    wanted = [(header, name) for name in header.tensors] * 20
    for (_, name), tensor in zip(wanted, read_ahead.read_ahead(wanted, device), strict=True):
        work = [torch.full((250, 4), 7.0, device=device) for _ in range(4)]
        large = large @ large / 64  # a queue of work; what `work` held is freed behind it
        for one in work:
            one.add_(large[0, 0])
        del work, one
        assert torch.equal(tensor.cpu().float(), kept[name].float())


def test_a_reader_that_stops_early_leaves_no_thread(files):
    header = read_header(files[0])
    stream = read_ahead.read_ahead([(header, name) for name in header.tensors], CPU)
    next(stream)
    assert any(thread.name.startswith("weights") for thread in threading.enumerate())
    stream.close()
    assert not any(thread.name.startswith("weights") for thread in threading.enumerate())


def test_a_file_cut_off_meanwhile_is_said(files):
    header = read_header(files[0])
    files[0].write_bytes(files[0].read_bytes()[:-500])
    with pytest.raises(CheckpointError, match="changed while it was read"):
        list(read_ahead.read_ahead([(header, name) for name in header.tensors], CPU))
