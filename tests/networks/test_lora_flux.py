"""networks.lora_flux: names, ranks, files, maths, and what other programs make of its files."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from library.errors import CheckpointError, NetworkPluginError
from library.models.key_maps import flux_from_diffusers
from networks.ggpo import Perturbation
from networks.interface import OptionsView
from networks.layers import Dropouts, LoRALinear
from networks.lora_flux import LoRANetwork, create_network, create_network_from_weights
from networks.names import diffusers_names
from networks.options import parse
from networks.targets import Candidate, Target, parse_indices
from tests.networks.tiny_models import WIDTH, Rig, TinyFlux

GOLDEN = Path(__file__).parents[1] / "data" / "networks" / "kohya_lora_tiny.safetensors"
_DOUBLE = ("mod_lin", "attn_qkv", "attn_proj", "mlp_0", "mlp_2")
BLOCK_0 = [
    *(f"double_blocks_0_{side}_{part}" for side in ("img", "txt") for part in _DOUBLE),
    *(f"single_blocks_0_{part}" for part in ("linear1", "linear2", "modulation_lin")),
]  # fmt: skip


def network(rig: Rig, *, dim: int = 4, alpha: float = 2.0, **arguments: object) -> LoRANetwork:
    torch.manual_seed(5)
    made = create_network(1.0, dim, alpha, None, rig.text_encoders, rig.flux, **arguments)
    made.apply_to(rig.text_encoders, rig.flux, True, True)
    return made


def ranks(made: LoRANetwork) -> dict[str, int]:
    return {lora.lora_name.removeprefix("lora_unet_"): lora.rank for lora in made.unet_loras}


def fill(made: nn.Module, *, seed: int = 1) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)


def test_names_of_all_layers() -> None:
    rig = Rig()
    made = network(rig, train_t5xxl="True", in_dims="1,1,1,1,1")
    assert list(ranks(made))[:10] == BLOCK_0[:10]
    assert [name for name in ranks(made) if name.startswith("single_blocks_0")] == BLOCK_0[10:]
    assert [lora.lora_name for lora in made.text_encoder_loras] == [
        *(f"lora_te1_text_model_encoder_layers_0_self_attn_{x}_proj" for x in ("k", "v", "q", "out")),
        *(f"lora_te1_text_model_encoder_layers_0_mlp_{x}" for x in ("fc1", "fc2")),
        *(f"lora_te3_encoder_block_0_layer_0_SelfAttention_{x}" for x in "qkvo"),
        *(f"lora_te3_encoder_block_0_layer_1_DenseReluDense_{x}" for x in ("wi_0", "wi_1", "wo")),
    ]
    assert list(ranks(made))[-8:] == [
        "img_in", "time_in_in_layer", "time_in_out_layer", "vector_in_in_layer", "vector_in_out_layer",
        "guidance_in_in_layer", "guidance_in_out_layer", "txt_in",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "changed"),
    [
        ({}, {}),
        ({"img_attn_dim": "7"}, {"double_blocks_0_img_attn_qkv": 7, "double_blocks_0_img_attn_proj": 7}),
        ({"txt_attn_dim": "7"}, {"double_blocks_0_txt_attn_qkv": 7, "double_blocks_0_txt_attn_proj": 7}),
        ({"img_mlp_dim": "7"}, {"double_blocks_0_img_mlp_0": 7, "double_blocks_0_img_mlp_2": 7}),
        ({"txt_mlp_dim": "7"}, {"double_blocks_0_txt_mlp_0": 7, "double_blocks_0_txt_mlp_2": 7}),
        ({"img_mod_dim": "0"}, {"double_blocks_0_img_mod_lin": None}),
        ({"txt_mod_dim": "1"}, {"double_blocks_0_txt_mod_lin": 1}),
        ({"single_dim": "7"}, {"single_blocks_0_linear1": 7, "single_blocks_0_linear2": 7}),
        ({"single_mod_dim": "7"}, {"single_blocks_0_modulation_lin": 7}),
        ({"train_blocks": "double"}, dict.fromkeys(BLOCK_0[10:])),
        ({"train_blocks": "single"}, dict.fromkeys(BLOCK_0[:10])),
        ({"train_double_block_indices": "none"}, dict.fromkeys(BLOCK_0[:10])),
        ({"train_double_block_indices": ""}, dict.fromkeys(BLOCK_0[:10])),
        ({"train_single_block_indices": "1"}, dict.fromkeys(BLOCK_0[10:])),
        ({"target_regex": "transformer.single_transformer_blocks.(0|7).proj_out"},
         dict.fromkeys(name for name in BLOCK_0 if name != "single_blocks_0_linear2")),
        ({"target_regex": r"double_blocks\.\d+\.img_", "exclude_regex": "lora_unet_.*_mod_lin"},
         dict.fromkeys(name for name in BLOCK_0 if "_img_" not in name or "mod_lin" in name)),
        ({"exclude_regex": r"attn\.to_q|add_k_proj"},
         dict.fromkeys(name for name in BLOCK_0 if "qkv" in name or "linear1" in name)),
        (
            {"network_reg_dims": "img_mlp_\\d{1,2}=3,img_=9", "train_double_block_indices": "none"},
            {**dict.fromkeys(BLOCK_0[:10]), "double_blocks_0_img_mlp_0": 3, "double_blocks_0_img_mlp_2": 3,
             "double_blocks_0_img_mod_lin": 9, "double_blocks_0_img_attn_qkv": 9,
             "double_blocks_0_img_attn_proj": 9},
        ),
    ],
)  # fmt: skip
def test_ranks_by_network_args(arguments: dict[str, str], changed: dict[str, int | None]) -> None:
    expected = {name: rank for name, rank in {**dict.fromkeys(BLOCK_0, 4), **changed}.items() if rank}
    found = ranks(network(Rig(), **arguments))
    assert {name: rank for name, rank in found.items() if "blocks_0" in name} == expected


def test_a_name_that_no_layer_has_is_refused() -> None:
    with pytest.raises(NetworkPluginError, match=r"target_regex=blocks.99.*leaves no layer"):
        network(Rig(), target_regex="blocks.99")


def test_diffusers_names_are_those_of_the_loader() -> None:
    recipes = flux_from_diffusers(depth=2, depth_single_blocks=1, guidance=True)
    layers = {name.removesuffix(".weight"): recipe for name, recipe in recipes.items()}
    blocks = {
        name: recipe.sources
        for name, recipe in layers.items()
        if "_blocks." in name and not name.endswith((".bias", ".scale"))
    }
    assert {
        name: tuple(f"{one.removeprefix('transformer.')}.weight" for one in diffusers_names(name))
        for name in blocks
    } == blocks


def test_block_lists() -> None:
    assert parse_indices("k", "0,1,8-12", 13) == {0, 1, 8, 9, 10, 11, 12}
    assert parse_indices("k", "all", 3) == {0, 1, 2}
    assert parse_indices("k", "none", 3) == frozenset()
    for text in ("3", "0-3", "2-1", "a", "0;1", "-1"):
        with pytest.raises(NetworkPluginError, match="k="):
            parse_indices("k", text, 3)
    with pytest.raises(NetworkPluginError, match=r"train_single_block_indices=5.*blocks 0 to 1"):
        create_network(1.0, 4, 1.0, None, [], TinyFlux(2), train_single_block_indices="5")


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"img_mod_dim0": "1"}, "did you mean img_mod_dim"),
        ({"algo": "lokr"}, "lycoris.kohya"),
        ({"target_modules": "x"}, "did you mean target_regex"),
        ({"quux": "x"}, "known are"),
        ({"train_t5xxl": "maybe"}, "must be True or False"),
        ({"img_attn_dim": "-1"}, "negative"),
        ({"img_attn_dim": "many"}, "whole number"),
        ({"rank_dropout": "1"}, "below 1"),
        ({"loraplus_lr_ratio": "x"}, "must be a number"),
        ({"in_dims": "[1,2]"}, "needs 5 ranks"),
        ({"train_blocks": "both"}, "all, double, single"),
        ({"network_reg_dims": "img"}, "regex=number"),
        ({"network_reg_lrs": "(=1"}, "no regular expression"),
        ({"target_regex": "(7"}, "no regular expression"),
        ({"ggpo_sigma": "0.1"}, "only work together"),
    ],
)
def test_bad_network_args(arguments: dict[str, str], sentence: str) -> None:
    with pytest.raises(NetworkPluginError, match=sentence):
        parse(arguments)


def test_network_args_of_other_modules_are_named_not_refused() -> None:
    options = parse(
        {
            "preset": "full",
            "conv_dim": "4",
            "dora_wd": "False",
            "split_qkv": "False",
            "in_dims": "",
            "dropout": None,
        }
    )
    assert options.without_effect == ("conv_dim", "dora_wd", "preset")
    assert not options.split_qkv
    assert options.in_dims == ()


def test_a_file_of_the_reference_is_read_to_the_last_key(tmp_path: Path) -> None:
    tensors = load_file(GOLDEN)
    flux = golden_flux()
    made, _ = create_network_from_weights(1.0, GOLDEN, None, [], flux)
    made.apply_to([], flux, False, True)
    made.save_weights(tmp_path / "again.safetensors", None, {"ss_network_dim": "5"})
    again = load_file(tmp_path / "again.safetensors")
    assert again.keys() == tensors.keys()
    assert all(
        torch.equal(again[name], tensors[name]) and again[name].dtype == tensors[name].dtype
        for name in tensors
    )
    assert all(lora.scale == pytest.approx(3 / 5) for lora in made.loras)


def test_hashes_are_those_of_the_reference(tmp_path: Path) -> None:
    flux = golden_flux()
    made, _ = create_network_from_weights(1.0, GOLDEN, None, [], flux)
    made.save_weights(tmp_path / "again.safetensors", None, {"ss_network_dim": "5", "modelspec.title": "x"})
    expected = header(GOLDEN)["__metadata__"]
    written = header(tmp_path / "again.safetensors")["__metadata__"]
    assert written["sshs_model_hash"] == expected["sshs_model_hash"]
    assert written["sshs_legacy_hash"] == expected["sshs_legacy_hash"]
    assert written["modelspec.title"] == "x"


def header(path: Path) -> dict:
    data = path.read_bytes()
    return json.loads(data[8 : 8 + struct.unpack("<Q", data[:8])[0]])


class GoldenBlock(nn.Module):
    """The Linear layers of one block of the model the golden file was trained on (hidden 64), by path."""

    def __init__(self, layers: dict[str, tuple[int, int]]) -> None:
        super().__init__()
        for path, (given, out) in layers.items():
            *owners, leaf = path.split(".")
            owner: nn.Module = self
            for name in owners:
                if not hasattr(owner, name):
                    owner.add_module(name, nn.Module())
                owner = getattr(owner, name)
            owner.add_module(leaf, nn.Linear(given, out))


class DoubleStreamBlock(GoldenBlock):
    pass


class SingleStreamBlock(GoldenBlock):
    pass


def blocks_of_width(width: int, *, depth: int) -> nn.Module:
    side = {"mod.lin": (1, 6), "attn.qkv": (1, 3), "attn.proj": (1, 1), "mlp.0": (1, 4), "mlp.2": (4, 1)}
    double = {f"{name}_{path}": shape for name in ("img", "txt") for path, shape in side.items()}
    single = {"linear1": (1, 7), "linear2": (5, 1), "modulation.lin": (1, 3)}
    shapes = [{path: (i * width, o * width) for path, (i, o) in kind.items()} for kind in (double, single)]
    flux = nn.Module()
    flux.double_blocks = nn.ModuleList(DoubleStreamBlock(shapes[0]) for _ in range(depth))
    flux.single_blocks = nn.ModuleList(SingleStreamBlock(shapes[1]) for _ in range(depth))
    return flux


def golden_flux() -> nn.Module:
    return blocks_of_width(64, depth=2)


def target(linear: nn.Linear, *, rank: int = 4, parts: tuple[int, ...] = ()) -> Target:
    return Target(candidate=Candidate(prefix="lora_unet", path="x", linear=linear), rank=rank, parts=parts)


def layer(*, dropouts: Dropouts | None = None, parts: tuple[int, ...] = (), alpha: float = 2.0) -> LoRALinear:
    torch.manual_seed(0)
    linear = nn.Linear(6, 9).requires_grad_(False)
    made = LoRALinear(
        target(linear, parts=parts), alpha=alpha, dropouts=dropouts or Dropouts(), multiplier=1.0
    )
    made.apply_to()
    fill(made)
    return made


def test_forward_is_the_formula() -> None:
    made, x = layer(), torch.randn(3, 5, 6)
    base = nn.functional.linear(x, made.linear.weight, made.linear.bias)
    expected = base + x @ made.lora_down.weight.T @ made.lora_up.weight.T * (2.0 / 4)
    torch.testing.assert_close(made.linear(x), expected)


def test_initial_numbers_are_those_of_the_reference_for_one_seed() -> None:
    linear = nn.Linear(6, 9)
    torch.manual_seed(3)
    made = LoRALinear(target(linear), alpha=0.0, dropouts=Dropouts(), multiplier=1.0)
    torch.manual_seed(3)
    down, up = nn.Linear(6, 4, bias=False), nn.Linear(4, 9, bias=False)
    nn.init.kaiming_uniform_(down.weight, a=5**0.5)
    nn.init.zeros_(up.weight)
    assert torch.equal(made.lora_down.weight, down.weight)
    assert torch.equal(made.ups()[0].weight, up.weight)
    assert made.scale == 1.0, "alpha 0 means alpha = rank"
    assert made.alpha.dtype == torch.float32


def test_split_layer_trains_parts_apart_and_its_file_gives_the_same_output() -> None:
    made, x = layer(parts=(3, 4, 2)), torch.randn(2, 6)
    downs = made.lora_down.weight.split(4)
    parts = [x @ down.T @ up.weight.T * (2.0 / 4) for down, up in zip(downs, made.ups(), strict=True)]
    torch.testing.assert_close(made.linear(x), made._base_forward(x) + torch.cat(parts, -1))
    saved = made.export()
    assert saved["lora_down.weight"].shape == (12, 6)
    assert saved["alpha"] == 6.0
    joined = x @ saved["lora_down.weight"].T @ saved["lora_up.weight"].T * (saved["alpha"] / 12)
    torch.testing.assert_close(joined, torch.cat(parts, -1))
    torch.testing.assert_close(made.delta() @ x.T, joined.T)


def test_a_plain_file_loads_into_split_layers_and_a_split_one_into_plain_layers() -> None:
    plain, split = Rig(), Rig()
    source, goal = network(plain), network(split, split_qkv=True)
    fill(source)
    goal.load_tensors(source.export(), origin="plain")
    torch.testing.assert_close(split.output(), plain.output())

    fill(goal, seed=4)
    other = Rig()
    made, _ = create_network_from_weights(1.0, None, None, other.text_encoders, other.flux, goal.export())
    made.apply_to(other.text_encoders, other.flux, True, True)
    torch.testing.assert_close(other.output(), split.output())

    third = Rig()
    made, _ = create_network_from_weights(
        1.0, None, None, third.text_encoders, third.flux, source.export(), split_qkv="True"
    )
    made.apply_to(third.text_encoders, third.flux, True, True)
    assert any(lora.parts for lora in made.loras)
    torch.testing.assert_close(third.output(), plain.output())

    mixed = {name: t.clone() for name, t in goal.export().items()}
    mixed["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"] += 1
    with pytest.raises(CheckpointError, match="is not split"):
        goal.load_tensors(mixed, origin="mixed")


def test_strength_of_a_loaded_file_is_the_files() -> None:
    rig = Rig()
    made = network(rig, alpha=4.0)
    tensors = {name: t.clone() for name, t in made.export().items()}
    tensors["lora_unet_single_blocks_0_linear2.alpha"] = torch.tensor(1.0)
    made.load_tensors(tensors, origin="x")
    scales = {lora.lora_name: lora.scale for lora in made.loras}
    assert scales["lora_unet_single_blocks_0_linear2"] == 0.25
    assert scales["lora_unet_single_blocks_1_linear2"] == 1.0

    resumed = network(Rig(), alpha=4.0)
    for name, buffer in resumed.named_buffers():  # as a resumed run does
        buffer.copy_(made.get_buffer(name))
    assert {lora.lora_name: lora.scale for lora in resumed.loras} == scales


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda t: {"a.lokr_w1": torch.ones(1)}, "lycoris.kohya"),
        (lambda t: {"transformer.x.lora_A.weight": torch.ones(1)}, "convert the file to Kohya's"),
        (lambda t: {"o.lora_down.weight": torch.ones(1), "o.lora_up.weight": torch.ones(1)}, "none of its"),
        (lambda t: {k: v for k, v in t.items() if not k.endswith("lora_up.weight")}, "lacks lora_up.weight"),
        (lambda t: {k: v[:2] if "down" in k else v for k, v in t.items()}, "dim_from_weights"),
    ],
)  # fmt: skip
def test_files_that_do_not_fit_are_refused(change: object, sentence: str, tmp_path: Path) -> None:
    made = network(Rig())
    save_file(
        {k: v.detach().contiguous() for k, v in change(made.export()).items()}, tmp_path / "x.safetensors"
    )
    with pytest.raises(CheckpointError, match=sentence):
        made.load_weights(tmp_path / "x.safetensors")


def test_partial_files_load_and_say_what_is_missing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    made = network(Rig())
    before = {k: v.detach().clone() for k, v in made.export().items()}
    part = {k: v + 1 for k, v in before.items() if "single_blocks_0_linear1" in k}
    save_file(part, tmp_path / "x.safetensors")
    with caplog.at_level("WARNING", logger="networks.lora_flux"):
        made.load_weights(tmp_path / "x.safetensors")
    after = made.export()
    assert all(torch.equal(after[k], part.get(k, before[k])) for k in before)
    assert f"lacks {len(made.loras) - 1} layers" in caplog.text


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_save_dtype_counts_for_alpha_too(suffix: str, tmp_path: Path) -> None:
    rig = Rig()
    made = network(rig)
    fill(made)
    made.save_weights(tmp_path / f"x{suffix}", torch.bfloat16, None)
    other = Rig()
    again, tensors = create_network_from_weights(
        1, tmp_path / f"x{suffix}", None, other.text_encoders, other.flux
    )
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert tensors["lora_unet_single_blocks_0_linear1.alpha"].ndim == 0
    assert {parameter.dtype for parameter in again.parameters()} <= {torch.float32}


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("arguments", [{}, {"split_qkv": True}, {"ggpo_sigma": 0.1, "ggpo_beta": 0.1}])
def test_a_bf16_model_is_trained_with_float32_adapters(arguments: dict[str, object], autocast: bool) -> None:
    rig = Rig(dtype=torch.bfloat16)
    base = rig.output()
    made = network(rig, rank_dropout=0.1, module_dropout=0.1, dropout=0.1, **arguments)
    fill(made)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        for _ in range(2):
            output = rig.output()
            output.float().square().mean().backward()
            made.update_grad_norms()
    assert output.dtype == base.dtype
    assert all(p.dtype == torch.float32 and p.grad is not None for p in made.parameters())


def test_module_dropout_keeps_every_parameter_in_the_graph() -> None:
    made, x = layer(dropouts=Dropouts(module=0.5)).train(), torch.randn(4, 6)
    base = made._base_forward(x)
    whole = made.eval().linear(x)
    made.train()
    seen = set()
    for _ in range(40):
        made.zero_grad()
        output = made.linear(x)
        output.sum().backward()
        assert all(p.grad is not None for p in made.parameters())
        if torch.equal(output, base):
            seen.add("dropped")
        else:
            torch.testing.assert_close(output, whole)
            seen.add("kept")
    assert seen == {"dropped", "kept"}


def test_rank_dropout_is_per_sample_and_keeps_the_mean() -> None:
    made, x = layer(dropouts=Dropouts(rank=0.5)).train(), torch.randn(1, 3, 6).expand(4000, 3, 6)
    extra = (made.linear(x) - made._base_forward(x)).detach()
    expected = (made.eval().linear(x[:1]) - made._base_forward(x[:1])).detach()
    assert (extra.mean(0) - expected[0]).abs().max() < 0.12 * expected.abs().max()
    assert len(torch.unique(extra[:, 0].round(decimals=4), dim=0)) == 2**4


def test_neuron_dropout_comes_from_the_trainer_or_from_network_args() -> None:
    rig = Rig()
    by_trainer = create_network(1.0, 4, 1.0, None, [], rig.flux, neuron_dropout=0.3, dropout=0.1)
    by_args = create_network(1.0, 4, 1.0, None, [], rig.flux, dropout="0.1")
    assert {lora.dropouts.activation for lora in by_trainer.loras} == {0.3}
    assert {lora.dropouts.activation for lora in by_args.loras} == {0.1}


def test_adapters_cost_nothing_at_multiplier_zero_without_gradients() -> None:
    made, x = layer(), torch.randn(2, 6)
    fill(made)
    made.multiplier = 0.0
    with torch.no_grad():
        made.lora_down.weight.fill_(float("nan"))
        assert torch.equal(made.linear(x), made._base_forward(x))


@pytest.mark.parametrize("split", [False, True])
def test_norms_and_their_limit(split: bool) -> None:
    rig = Rig()
    made = network(rig, split_qkv=split)
    fill(made)
    full = [(lora.joined_up() @ lora.lora_down.weight * lora.scale).norm().detach() for lora in made.loras]
    torch.testing.assert_close(torch.stack([lora.delta_norm() for lora in made.loras]), torch.stack(full))
    limit = float(torch.stack(full).median())
    scaled, mean, largest = made.apply_max_norm_regularization(limit, None)
    expected = [min(float(norm), limit) for norm in full]
    assert scaled == sum(float(norm) > limit for norm in full) > 0
    assert mean == pytest.approx(sum(expected) / len(expected), rel=1e-4)
    assert largest == pytest.approx(limit, rel=1e-4)
    after = [lora.delta().norm().item() for lora in made.loras]
    assert after == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("split", [False, True])
def test_ggpo_norms_are_those_of_the_full_matrices(split: bool) -> None:
    rig = Rig()
    made = network(rig, ggpo_sigma="0.03", ggpo_beta="0.01", split_qkv=split)
    fill(made)
    rig.output().square().mean().backward()
    made.update_grad_norms()
    for lora in made.unet_loras:
        up, down = lora.joined_up(), lora.lora_down.weight
        grad_up = torch.block_diag(*(part.weight.grad for part in lora.ups()))
        base = lora.linear.weight.norm(dim=1).mean()
        delta = lora.scale * up @ down
        gradient = lora.scale * (up @ lora.lora_down.weight.grad + grad_up @ down)
        torch.testing.assert_close(
            lora.perturbation.combined, (base**2 + delta.square().sum(1)).sqrt().detach()
        )
        torch.testing.assert_close(
            lora.perturbation.gradient, gradient.norm(dim=1).detach(), rtol=1e-3, atol=1e-6
        )
    assert made.grad_norms().shape == made.combined_weight_norms().shape == (len(made.unet_loras),)


def test_ggpo_disturbs_training_only_and_by_the_stated_deviation() -> None:
    made = layer()
    made.perturbation = Perturbation(made.linear, sigma=0.5, beta=2.0)
    made.linear(torch.randn(8, 6)).square().sum().backward()
    made.update_perturbation()
    deviation = (0.5 * made.perturbation.combined + 2.0 * made.perturbation.gradient**2) / 3.0
    x = torch.eye(6)
    calm = made.eval().linear(x)
    assert torch.equal(calm, made.linear(x))
    made.train()
    torch.manual_seed(2)
    draws = torch.stack([(made.linear(x) - calm).detach() for _ in range(600)])
    torch.testing.assert_close(draws.std(dim=(0, 1)), deviation, rtol=0.06, atol=0)


def test_ggpo_goes_on_after_a_resume_as_it_stopped() -> None:
    rig, fresh = Rig(), Rig()
    made, resumed = (network(one, ggpo_sigma="0.03", ggpo_beta="0.01") for one in (rig, fresh))
    fill(made)
    rig.output().square().mean().backward()
    made.update_grad_norms()
    with torch.no_grad():
        for name, tensor in (*resumed.named_parameters(), *resumed.named_buffers()):
            tensor.copy_(made.state_dict()[name])
    outputs = []
    for one in (rig, fresh):
        torch.manual_seed(4)
        outputs.append(one.output())
    assert torch.equal(*outputs)
    made.eval()
    assert not torch.allclose(outputs[0], rig.output())
    leaves = {name.split(".", 1)[1] for name in made.export()}
    assert leaves == {"lora_down.weight", "lora_up.weight", "alpha"}


@pytest.mark.parametrize("content", [b"", b"hello", b"PK\x03\x04aaaa", torch.ones(3)])
def test_pickles_that_cannot_be_read_are_named(content: bytes | torch.Tensor, tmp_path: Path) -> None:
    file = tmp_path / "net.ckpt"
    if isinstance(content, bytes):
        file.write_bytes(content)
    else:
        torch.save(content, file)
    with pytest.raises(CheckpointError, match=r"net\.ckpt (is no file of tensors|holds a Tensor)"):
        network(Rig()).load_weights(file)


def test_ggpo_keeps_no_matrix_of_the_weights_size_for_the_backward_pass() -> None:
    made = layer()
    made.perturbation = Perturbation(made.linear, sigma=0.5, beta=2.0)
    made.linear(torch.randn(8, 6)).square().sum().backward()
    made.update_perturbation()
    made.train()
    kept: list[tuple[int, ...]] = []
    x = torch.randn(8, 6, requires_grad=True)

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor is not made.linear.weight:
            kept.append(tuple(sorted(tensor.shape)))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = made.linear(x)
    assert kept.count(tuple(sorted(made.linear.weight.shape))) == 1, "the layer's own weight alone"
    output.sum().backward()
    expected = made.linear.weight + made.delta()
    torch.testing.assert_close(x.grad, expected.sum(0).expand(8, -1))


def test_without_ggpo_nothing_is_computed() -> None:
    rig = Rig()
    made = network(rig)
    rig.output().sum().backward()
    made.update_grad_norms()
    assert made.grad_norms() is made.weight_norms() is made.combined_weight_norms() is None


@pytest.mark.parametrize("option", ["logging_dir", "log_with"])
def test_gradient_norms_are_measured_where_something_logs_them(option: str) -> None:
    rig = Rig()
    made = network(rig)
    made.prepare_network(OptionsView({"logging_dir": None, "log_with": None, option: "tensorboard"}))
    fill(made)
    rig.output().square().mean().backward()
    made.update_grad_norms()
    expected = []
    for lora in made.loras:
        down, up = lora.lora_down.weight, lora.lora_up.weight
        if down.grad is not None:
            gradient = lora.scale * (up @ down.grad + up.grad @ down)
            expected.append(gradient.norm(dim=1).mean().detach())
    assert len(expected) >= len(made.unet_loras)
    torch.testing.assert_close(made.grad_norms(), torch.stack(expected), rtol=1e-3, atol=1e-7)
    assert made.weight_norms() is made.combined_weight_norms() is None


def test_no_size_of_the_real_model_is_assumed() -> None:
    made = create_network(1.0, 4, 1.0, None, [], TinyFlux(3), split_qkv=True)
    split = {lora.lora_name: lora.parts for lora in made.unet_loras if lora.parts}
    assert split["lora_unet_double_blocks_2_txt_attn_qkv"] == (WIDTH, WIDTH, WIDTH)
    assert split["lora_unet_single_blocks_2_linear1"] == (WIDTH, WIDTH, WIDTH, 4 * WIDTH)
    assert len(split) == 3 * 2 + 3


@pytest.mark.parametrize("split", [False, True])
def test_diffusers_takes_every_layer_at_the_trained_strength(split: bool, tmp_path: Path) -> None:
    """At the real width, which diffusers assumes, but on the meta device and with one block of each kind."""
    from diffusers import FluxTransformer2DModel
    from diffusers.loaders import FluxLoraLoaderMixin

    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        flux = blocks_of_width(3072, depth=1)
    made = create_network(1.0, 1, 3.0, None, [], flux, split_qkv=split)
    made.apply_to([], flux, False, True)
    fill(made)
    made.save_weights(tmp_path / "x.safetensors", None, None)

    converted, alphas = FluxLoraLoaderMixin.lora_state_dict(
        load_file(tmp_path / "x.safetensors"), return_alphas=True
    )
    assert not alphas, "alphas are folded into the factors"
    names = {key.removeprefix("transformer.").rsplit(".lora_", 1)[0] for key in converted}
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert names == {n for n in linears if n.startswith(("transformer_blocks", "single_transformer_blocks"))}
    outputs = {}
    for name in names:
        down = converted.pop(f"transformer.{name}.lora_A.weight")
        up = converted.pop(f"transformer.{name}.lora_B.weight")
        assert (up.shape[0], down.shape[1]) == tuple(linears[name].weight.shape)
        outputs[name] = up @ (down @ torch.linspace(-1, 1, down.shape[1]))
    assert not converted, "no tensor is left over"

    own = {lora.lora_name: lora for lora in made.loras}
    for theirs, ours in {
        tuple(f"transformer_blocks.0.attn.to_{x}" for x in "qkv"):
            "lora_unet_double_blocks_0_img_attn_qkv",
        ("single_transformer_blocks.0.attn.to_q", "single_transformer_blocks.0.attn.to_k",
         "single_transformer_blocks.0.attn.to_v", "single_transformer_blocks.0.proj_mlp"):
            "lora_unet_single_blocks_0_linear1",
        ("transformer_blocks.0.ff.net.2",): "lora_unet_double_blocks_0_img_mlp_2",
    }.items():  # fmt: skip
        lora = own[ours]
        hidden = lora.lora_down.weight @ torch.linspace(-1, 1, lora.linear.in_features)
        expected = lora.joined_up() @ hidden * lora.scale
        got = torch.cat([outputs[name] for name in theirs])
        torch.testing.assert_close(got, expected.detach(), atol=2e-4, rtol=1e-5)
