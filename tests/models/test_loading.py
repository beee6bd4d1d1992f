"""Every layout of every model loads to the same weights, and what does not fit says so."""

from __future__ import annotations

import json

import pytest
import torch
from diffusers import AutoencoderKL, FluxTransformer2DModel
from model_examples import flux_params, random_autoencoder, random_flux
from safetensors.torch import save_file as plain_save

from library.errors import CheckpointError
from library.files.safetensors import save_file
from library.models.key_maps import autoencoder_to_diffusers, flux_to_diffusers
from library.models.load import load_autoencoder, load_clip_l, load_flux, load_t5
from library.models.params import ClipParams, T5Params
from library.models.text_encoders import ClipL, T5Encoder

PARAMS = flux_params(depth=2, singles=2)
CLIP = ClipParams(vocab_size=50, hidden_size=64, intermediate_size=96, num_layers=1, num_heads=1)
T5 = T5Params(vocab_size=40, d_model=24, d_kv=8, d_ff=32, num_layers=2, num_heads=2)


@pytest.fixture(scope="module")
def weights():
    return dict(random_flux(PARAMS).state_dict())


def bfl(folder, weights):
    save_file(folder / "flux.safetensors", weights)
    return folder / "flux.safetensors"


def prefixed(folder, weights):
    save_file(folder / "flux.safetensors", {f"model.diffusion_model.{k}": v for k, v in weights.items()})
    return folder / "flux.safetensors"


def partly_prefixed(folder, weights):
    names = {k: k if i % 3 else f"model.diffusion_model.{k}" for i, k in enumerate(weights)}
    save_file(folder / "flux.safetensors", {names[k]: v for k, v in weights.items()})
    return folder / "flux.safetensors"


def sharded(folder, weights):
    items = list(weights.items())
    for number in range(4):
        save_file(folder / f"flux-0000{number + 1}-of-00004.safetensors", dict(items[number::4]))
    return folder / "flux-00003-of-00004.safetensors"


def diffusers_file(folder, weights):
    save_file(folder / "flux.safetensors", flux_to_diffusers(weights, PARAMS))
    return folder / "flux.safetensors"


def diffusers_folder(folder, weights):
    """Written by diffusers itself: config.json, an index and many shards in a sub-folder."""
    model = FluxTransformer2DModel(
        in_channels=64,
        num_layers=PARAMS.depth,
        num_single_layers=PARAMS.depth_single_blocks,
        attention_head_dim=PARAMS.hidden_size // PARAMS.num_heads,
        num_attention_heads=PARAMS.num_heads,
        joint_attention_dim=PARAMS.context_in_dim,
        pooled_projection_dim=PARAMS.vec_in_dim,
        guidance_embeds=True,
        axes_dims_rope=PARAMS.axes_dim,
    )
    model.load_state_dict(flux_to_diffusers(weights, PARAMS))
    model.save_pretrained(folder / "transformer", max_shard_size="100KB")
    assert len(list((folder / "transformer").glob("*.safetensors"))) > 3
    return folder


def diffusers_subfolder(folder, weights):
    return diffusers_folder(folder, weights) / "transformer"


LAYOUTS = (bfl, prefixed, partly_prefixed, sharded, diffusers_file, diffusers_folder, diffusers_subfolder)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda function: function.__name__)
@pytest.mark.parametrize("mmap", [True, False])
def test_every_layout_of_the_transformer(tmp_path, weights, layout, mmap):
    model = load_flux(layout(tmp_path, weights), mmap=mmap)
    assert model.params == PARAMS
    loaded = model.state_dict()
    assert set(loaded) == set(weights)
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_dtypes_are_kept_or_cast(tmp_path, weights):
    path = tmp_path / "mixed.safetensors"
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    plain_save({k: v.to(kinds[i % 3]) for i, (k, v) in enumerate(weights.items())}, path)
    kept = load_flux(path).state_dict()
    assert [kept[name].dtype for name in weights] == [kinds[i % 3] for i in range(len(weights))]
    assert {v.dtype for v in load_flux(path, dtype=torch.bfloat16).state_dict().values()} == {torch.bfloat16}


def test_checkpoint_of_all_four_models(tmp_path, weights):
    ae, clip, t5 = random_autoencoder(), ClipL(CLIP), T5Encoder(T5)
    path = tmp_path / "all_in_one.safetensors"
    tensors = {f"model.diffusion_model.{k}": v for k, v in weights.items()}
    tensors |= {f"vae.{k}": v for k, v in ae.state_dict().items()}
    tensors |= {f"text_encoders.clip_l.transformer.{k}": v for k, v in clip.state_dict().items()}
    t5_state = {k: v for k, v in t5.state_dict().items() if k != "encoder.embed_tokens.weight"}
    tensors |= {f"text_encoders.t5xxl.transformer.{k}": v for k, v in t5_state.items()}
    tensors["text_encoders.t5xxl.logit_scale"] = torch.ones(())
    save_file(path, tensors)
    for load, reference in (
        (load_flux, random_flux(PARAMS)),
        (load_autoencoder, ae),
        (load_clip_l, clip),
        (load_t5, t5),
    ):
        loaded = load(path).state_dict()
        assert all(torch.equal(loaded[name], value) for name, value in reference.state_dict().items())


def test_autoencoder_of_a_diffusers_folder(tmp_path):
    ours = random_autoencoder()
    params = ours.params
    theirs = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=[params.ch * m for m in params.ch_mult],
        layers_per_block=params.num_res_blocks,
        latent_channels=16,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.5,
        shift_factor=0.25,
    )
    theirs.load_state_dict(autoencoder_to_diffusers(ours.state_dict(), params))
    theirs.save_pretrained(tmp_path / "vae")
    loaded = load_autoencoder(tmp_path)
    assert (loaded.params.scale_factor, loaded.params.shift_factor) == (0.5, 0.25)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in ours.state_dict().items())


@pytest.mark.parametrize("rename", [lambda k: k, lambda k: k.removeprefix("text_model.")], ids=["4", "5"])
def test_clip_under_the_names_of_either_transformers(tmp_path, rename):
    clip = ClipL(CLIP)
    tensors = {rename(k): v for k, v in clip.state_dict().items()}
    tensors |= {"text_projection.weight": torch.ones(2, 2), "logit_scale": torch.ones(())}
    save_file(tmp_path / "clip.safetensors", tensors)
    loaded = load_clip_l(tmp_path / "clip.safetensors")
    assert loaded.params == CLIP
    ids = torch.randint(0, 50, (2, 77))
    torch.testing.assert_close(loaded(ids), clip(ids))


@pytest.mark.parametrize("embedding", ["shared.weight", "encoder.embed_tokens.weight"])
def test_t5_under_either_name_of_its_embedding(tmp_path, embedding):
    t5 = T5Encoder(T5)
    tensors = {k: v for k, v in t5.state_dict().items() if k != "encoder.embed_tokens.weight"}
    tensors[embedding] = tensors.pop("shared.weight")
    tensors["decoder.block.0.layer.0.SelfAttention.q.weight"] = torch.ones(2, 2)
    save_file(tmp_path / "t5.safetensors", tensors)
    loaded = load_t5(tmp_path / "t5.safetensors")
    assert loaded.params == T5
    ids = torch.randint(0, 40, (2, 9))
    torch.testing.assert_close(loaded(ids), t5(ids))


def test_scaled_8_bit_weights_are_multiplied_by_their_scale(tmp_path):
    t5 = T5Encoder(T5)
    tensors = {k: v for k, v in t5.state_dict().items() if k != "encoder.embed_tokens.weight"}
    name = "encoder.block.1.layer.0.SelfAttention.k"
    stored = torch.randn(tensors[f"{name}.weight"].shape).to(torch.float8_e4m3fn)
    tensors |= {f"{name}.weight": stored, f"{name}.scale_weight": torch.tensor(0.25)}
    tensors["scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    save_file(tmp_path / "t5.safetensors", tensors)
    loaded = load_t5(tmp_path / "t5.safetensors", dtype=torch.float32)
    torch.testing.assert_close(loaded.state_dict()[f"{name}.weight"], stored.float() * 0.25)


def test_missing_unknown_and_misshapen_tensors_are_named(tmp_path, weights):
    def load(changes, remove=()):
        tensors = {k: v for k, v in weights.items() if k not in remove} | changes
        save_file(tmp_path / "flux.safetensors", tensors)
        return load_flux(tmp_path / "flux.safetensors")

    with pytest.raises(CheckpointError, match=r"lacks 1 tensor.*double_blocks\.1\.img_mlp\.2\.bias"):
        load({}, remove=["double_blocks.1.img_mlp.2.bias"])
    with pytest.raises(CheckpointError, match=r"unknown 1 tensor.*double_blocks\.1\.extra"):
        load({"double_blocks.1.extra": torch.ones(1)})
    with pytest.raises(CheckpointError, match=r"single_blocks\.1\.linear2\.bias as \(5,\), and \(32,\)"):
        load({"single_blocks.1.linear2.bias": torch.ones(5)})
    with pytest.raises(CheckpointError, match=r"looks like a FLUX.1 transformer but lacks .*vector_in"):
        load({}, remove=["vector_in.in_layer.weight"])


def test_missing_shards_are_named(tmp_path, weights):
    one = sharded(tmp_path, weights)
    (tmp_path / "flux-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match="flux-00002-of-00004"):
        load_flux(one)
    folder = diffusers_folder(tmp_path / "repository", weights)
    index = next((folder / "transformer").glob("*.index.json"))
    gone = sorted(set(json.loads(index.read_text())["weight_map"].values()))[1]
    (folder / "transformer" / gone).unlink()
    with pytest.raises(CheckpointError, match=gone):
        load_flux(folder)
