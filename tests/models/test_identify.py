"""Every kind of file is recognised by its header, and every bad one has a sentence of its own."""

from __future__ import annotations

import json
import struct
import zipfile

import pytest
import torch
from model_examples import flux_params, random_autoencoder, random_flux

from library.errors import CheckpointError
from library.files.safetensors import save_file
from library.models.identify import KINDS, inspect, require
from library.models.key_maps import autoencoder_to_diffusers, flux_to_diffusers
from library.models.locate import locate
from library.models.params import ClipParams, FluxParams, T5Params

CLIP = "encoder.layers.0.self_attn.k_proj.weight"
T5 = "encoder.block.0.layer.0.SelfAttention"


def header_only(path, shapes):
    """A file whose header speaks of tensors of full size, over a hole instead of numbers."""
    offset, entries = 0, {}
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)
    return path


FAKES = {
    "clip_l": {f"text_model.{CLIP}": (768, 768)},
    "clip_g": {f"text_model.{CLIP}": (1280, 1280)},
    "t5xxl": {f"{T5}.q.weight": (4096, 4096)},
    "sd15": {"model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3), "first_stage_model.x": (1,)},
    "sdxl": {
        "model.diffusion_model.input_blocks.0.0.weight": (320, 4, 3, 3),
        "model.diffusion_model.label_emb.0.0.weight": (1280, 2816),
    },
    "sd3": {"model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight": (4608, 1536)},
    "chroma": {
        "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
        "distilled_guidance_layer.in_proj.weight": (5120, 64),
    },
    "lora": {"lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight": (4, 3072)},
    "sd_vae": {
        "decoder.conv_in.weight": (512, 4, 3, 3),
        "encoder.down.0.block.0.conv1.weight": (128, 128, 3, 3),
    },
    "flux2": {
        "double_blocks.0.img_attn.qkv.weight": (9216, 3072),
        "double_stream_modulation_img.lin.weight": (18432, 3072),
    },
    "nf4": {"double_blocks.0.img_attn.qkv.weight.quant_state.bitsandbytes__nf4": (4,)},
    "unknown": {"something.weight": (2, 2)},
}


@pytest.mark.parametrize("kind", FAKES)
def test_kinds_by_header(tmp_path, kind):
    path = header_only(tmp_path / "model.safetensors", FAKES[kind])
    assert inspect(path).kind == kind
    for wanted in {"flux", "ae", "clip_l", "t5xxl"} - {kind}:
        with pytest.raises(CheckpointError) as error:
            require(path, wanted, "opt")
        text = str(error.value)
        assert text.startswith(f"--opt {path} is {KINDS[kind][0]}")
        assert text.count(".") >= 1
        assert "\n" not in text


@pytest.mark.parametrize(("guidance", "variant"), [(True, "dev"), (False, "schnell")])
@pytest.mark.parametrize("layout", ["bfl", "diffusers"])
def test_transformer_variants(tmp_path, guidance, variant, layout):
    params = flux_params(guidance=guidance)
    tensors = random_flux(params).state_dict()
    save_file(
        tmp_path / "m.safetensors", flux_to_diffusers(tensors, params) if layout == "diffusers" else tensors
    )
    info = inspect(tmp_path / "m.safetensors")
    assert (info.kind, info.layout, info.variant) == ("flux", layout, variant)
    assert info.parts["flux"].params() == params
    assert info.dtypes == {"F32"}


def test_autoencoder_layouts(tmp_path):
    model = random_autoencoder()
    save_file(tmp_path / "bfl.safetensors", model.state_dict())
    save_file(tmp_path / "other.safetensors", autoencoder_to_diffusers(model.state_dict(), model.params))
    for name, layout in (("bfl", "bfl"), ("other", "diffusers")):
        info = inspect(tmp_path / f"{name}.safetensors")
        assert (info.kind, info.layout) == ("ae", layout)
        assert info.parts["ae"].params() == model.params


def test_full_sizes_are_read_from_the_real_shapes():
    with torch.device("meta"):
        from library.models.flux import Flux
        from library.models.text_encoders import ClipL, T5Encoder

        models = {
            FluxParams: Flux(FluxParams()),
            ClipParams: ClipL(ClipParams()),
            T5Params: T5Encoder(T5Params()),
        }
    for params, model in models.items():
        shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
        assert params.from_shapes(shapes, {}) == params()


def test_heads_of_clip_from_metadata_and_config(tmp_path):
    shapes = {
        "text_model.embeddings.token_embedding.weight": torch.zeros(9, 32),
        "text_model.embeddings.position_embedding.weight": torch.zeros(77, 32),
        "text_model.encoder.layers.0.mlp.fc1.weight": torch.zeros(8, 32),
        f"text_model.{CLIP}": torch.zeros(32, 32),
    }

    def heads():
        return inspect(tmp_path / "clip.safetensors").parts["clip_l"].params().num_heads

    save_file(tmp_path / "clip.safetensors", shapes)
    assert heads() == 1
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 32, "num_attention_heads": 4}))
    assert heads() == 4
    (tmp_path / "config.json").write_text(json.dumps({"hidden_size": 768, "num_attention_heads": 12}))
    assert heads() == 1
    save_file(tmp_path / "clip.safetensors", shapes, {"config": json.dumps({"num_attention_heads": 2})})
    assert heads() == 2


def test_rotary_axes_of_a_config_win(tmp_path):
    params = flux_params(head=16)
    save_file(
        tmp_path / "m.safetensors",
        random_flux(params).state_dict(),
        {"config": '{"axes_dims_rope": [8, 4, 4]}'},
    )
    assert inspect(tmp_path / "m.safetensors").parts["flux"].params().axes_dim == (8, 4, 4)


def test_a_mix_up_names_the_right_option(tmp_path):
    path = header_only(tmp_path / "model.safetensors", FAKES["clip_l"])
    with pytest.raises(CheckpointError) as error:
        require(path, "ae", "ae")
    assert str(error.value) == f"--ae {path} is a CLIP-L text encoder; give it as --clip_l."


def good_bytes(tmp_path):
    save_file(tmp_path / "good.safetensors", {"a": torch.arange(100.0)})
    return (tmp_path / "good.safetensors").read_bytes()


def test_bad_files(tmp_path):
    good = good_bytes(tmp_path)
    archive = tmp_path / "archive"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("archive/data.pkl", b"x" * 100)
    cases = {
        "is cut off: it should have": good[:-10],
        "is cut off in its header": good[:30],
        "is empty": b"",
        "web page": b"<!DOCTYPE html><html><body>404</body></html>" + b" " * 100,
        "git-lfs pointer": b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 3\n",
        "PyTorch pickle": archive.read_bytes(),
        "GGUF": b"GGUF\x03\x00\x00\x00" + b"\x00" * 50,
        "error message": b'{"error":"Repository not found"}',
        "is not a safetensors file": b"\x00" * 64,
        "damaged header": struct.pack("<Q", 13) + b'{"a":{"b":1}}',
    }
    path = tmp_path / "model.safetensors"
    for sentence, data in cases.items():
        path.write_bytes(data)
        with pytest.raises(CheckpointError, match=sentence) as error:
            inspect(path)
        assert str(path) in str(error.value)
        assert "\n" not in str(error.value)


def test_missing_files_suggest_a_sibling(tmp_path):
    good_bytes(tmp_path)
    with pytest.raises(CheckpointError, match=r"does not exist\. Did you mean .*good\.safetensors\?"):
        inspect(tmp_path / "godo.safetensors")
    with pytest.raises(CheckpointError, match=r"Did you mean .*good\.safetensors\?"):
        locate(str(tmp_path / "goood.safetensors"), "flux", "pretrained_model_name_or_path")
    with pytest.raises(CheckpointError, match=r"folder .* does not exist either"):
        locate(str(tmp_path / "nowhere" / "x.safetensors"), "ae", "ae")
    with pytest.raises(CheckpointError, match=r"black-forest-labs/FLUX.*download the model first"):
        locate("black-forest-labs/FLUX.1-dev", "flux", "pretrained_model_name_or_path")
    assert locate(str(tmp_path), "flux", "x") == tmp_path


def test_folders_without_one_model(tmp_path):
    with pytest.raises(CheckpointError, match=r"has no \.safetensors file"):
        inspect(tmp_path)
    save_file(tmp_path / "a.safetensors", {"a": torch.ones(1)})
    save_file(tmp_path / "b.safetensors", {"a": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"several \.safetensors files"):
        inspect(tmp_path)


def test_a_repository_in_the_cache_of_hugging_face_is_used_from_there(tmp_path, monkeypatch):
    repository = tmp_path / "models--me--FLUX.1-mine"
    snapshot = repository / "snapshots" / "0123"
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert locate("me/FLUX.1-mine", "flux", "pretrained_model_name_or_path") == snapshot
    with pytest.raises(CheckpointError, match="nor in the cache of Hugging Face; download the model first"):
        locate("me/FLUX.1-other", "flux", "pretrained_model_name_or_path")
