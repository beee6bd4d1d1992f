"""The plug-in interface: finding modules, refusing bad ones, and one contract for every module."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from library.config.sections.network import NetworkConfig
from library.errors import NetworkPluginError
from networks.interface import NetworkHandle, OptionsView, create, merge_base_weights
from networks.plugins import load_plugin, network_arguments
from tests.networks.tiny_models import Rig, TinyFlux

OWN = {
    "plain": (),
    "type_dims": ("img_attn_dim=2", "txt_mod_dim=0", "single_dim=5"),
    "split": ("split_qkv=True",),
    "single_only": ("train_blocks=single",),
    "in_dims": ("in_dims=[1,2,3,2,1]",),
    "reg_dims": ("network_reg_dims=img_attn_qkv=6,txt_=0",),
    "plus": ("loraplus_lr_ratio=16",),
    "with_t5": ("train_t5xxl=true",),
    "dropouts": ("rank_dropout=0.2", "module_dropout=0.2"),
}
OFT = {"attention": (), "all_linear": ("enable_all_linear=True",)}
LYCORIS = {
    "lora": ("algo=lora",),
    "loha": ("algo=loha",),
    "lokr": ("algo=lokr", "factor=4", "decompose_both=False"),
    "lokr_full": ("algo=lokr", "factor=4", "full_matrix=True"),
}
VARIANTS = [
    *(pytest.param("networks.lora_flux", arguments, id=f"own-{name}") for name, arguments in OWN.items()),
    *(pytest.param("networks.oft_flux", arguments, id=f"oft-{name}") for name, arguments in OFT.items()),
    *(pytest.param("lycoris.kohya", arguments, id=f"lycoris-{name}") for name, arguments in LYCORIS.items()),
]


def config(module: str, arguments: tuple[str, ...] = (), **options: object) -> NetworkConfig:
    values = {"network_dim": 4, "network_alpha": 2.0, **options}
    return NetworkConfig(network_module=module, network_args=arguments, **values)


def applied(rig: Rig, settings: NetworkConfig, *, seed: int = 3) -> NetworkHandle:
    torch.manual_seed(seed)
    handle = create(settings, text_encoders=rig.text_encoders, transformer=rig.flux)
    handle.apply()
    return handle


def disturb(handle: NetworkHandle) -> None:
    """Give every parameter a value that shows."""
    torch.manual_seed(11)
    with torch.no_grad():
        for parameter in handle.module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    handle.module.eval()


def saved(handle: NetworkHandle, path: Path) -> dict[str, torch.Tensor]:
    handle.save(path, dtype=None, metadata={"ss_steps": "1"})
    with safe_open(path, "pt") as file:
        assert "sshs_model_hash" in file.metadata()
        assert file.metadata()["ss_steps"] == "1"
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - safe_open is no mapping


@pytest.mark.parametrize(("module", "arguments"), VARIANTS)
def test_contract_of_a_network(module: str, arguments: tuple[str, ...], tmp_path: Path) -> None:
    base = Rig().output()
    rig = Rig()
    handle = applied(rig, config(module, arguments))

    assert torch.equal(rig.output(), base), "an adapter changes nothing at the start"

    handle.module.eval()
    disturb(handle)
    groups = handle.parameter_groups(learning_rate=1e-3, unet_lr=None, text_encoder_lr=(2e-3, 3e-3))
    trained = {id(parameter) for group in groups for parameter in group.params}
    assert trained == {id(parameter) for parameter in handle.trainable_parameters()}
    rig.output().square().sum().backward()
    assert all(parameter.grad is not None for parameter in handle.trainable_parameters())
    for model in (rig.flux, *rig.text_encoders):
        assert all(parameter.grad is None for parameter in model.parameters())

    changed = rig.output()
    assert (changed - base).abs().max() > 1e-3
    tensors = saved(handle, tmp_path / "net.safetensors")
    assert {name.split("_")[1] for name in tensors} <= {"unet", "te1", "te3"}
    assert all(tensor.is_floating_point() for tensor in tensors.values())

    handle.set_multiplier(0.0)
    torch.testing.assert_close(rig.output(), base)

    fresh = Rig()
    again = applied(fresh, config(module, arguments, network_weights=tmp_path / "net.safetensors"), seed=8)
    again.module.eval()
    torch.testing.assert_close(fresh.output(), changed)

    found = Rig()
    weights = tmp_path / "net.safetensors"
    from_file = applied(
        found, config(module, arguments, network_weights=weights, dim_from_weights=True), seed=9
    )
    from_file.module.eval()
    torch.testing.assert_close(found.output(), changed)


@pytest.mark.parametrize(("module", "arguments"), VARIANTS)
def test_networks_are_made_on_models_without_weights(module: str, arguments: tuple[str, ...]) -> None:
    rig = Rig()
    expected = sum(p.numel() for p in applied(rig, config(module, arguments)).module.parameters())
    with torch.device("meta"):
        flux = TinyFlux()
    handle = create(config(module, arguments), text_encoders=Rig().text_encoders, transformer=flux)
    handle.apply()
    assert sum(p.numel() for p in handle.module.parameters()) == expected


@pytest.mark.parametrize("strength", [1.0, 0.4])
@pytest.mark.parametrize(("module", "arguments"), VARIANTS)
def test_merged_equals_applied(
    module: str, arguments: tuple[str, ...], strength: float, tmp_path: Path
) -> None:
    trained = Rig()
    handle = applied(trained, config(module, arguments))
    disturb(handle)
    handle.save(tmp_path / "net.safetensors", dtype=None, metadata=None)
    handle.set_multiplier(strength)

    merged = Rig()
    settings = config(
        module, base_weights=(tmp_path / "net.safetensors",), base_weights_multiplier=(strength,)
    )
    merge_base_weights(settings, text_encoders=merged.text_encoders, transformer=merged.flux)
    torch.testing.assert_close(merged.output(), trained.output(), atol=2e-5, rtol=1e-4)
    assert not any("forward" in vars(layer) for layer in merged.flux.modules())


def test_merging_twice_adds_up(tmp_path: Path) -> None:
    trained = Rig()
    handle = applied(trained, config("networks.lora_flux"))
    disturb(handle)
    file = tmp_path / "net.safetensors"
    handle.save(file, dtype=None, metadata=None)
    once, twice = Rig(), Rig()
    for rig, files, strengths in ((once, (file,), (2.0,)), (twice, (file, file), (1.0,))):
        settings = config("networks.lora_flux", base_weights=files, base_weights_multiplier=strengths)
        merge_base_weights(settings, text_encoders=rig.text_encoders, transformer=rig.flux)
    torch.testing.assert_close(once.output(), twice.output())


@pytest.mark.parametrize("module", ["networks.lora_flux", "lycoris.kohya"])
def test_sides_that_are_not_trained_are_left_alone(module: str) -> None:
    rig = Rig()
    handle = applied(rig, config(module, network_train_unet_only=True))
    assert not handle.trains_clip_l
    assert not any("forward" in vars(layer) for model in rig.text_encoders for layer in model.modules())
    names = {name.split("_")[1] for name in handle.module.state_dict()}
    assert names == {"unet"}

    rig = Rig()
    handle = applied(rig, config(module, network_train_text_encoder_only=True))
    assert not handle.trains_transformer
    assert not any("forward" in vars(layer) for layer in rig.flux.modules())


def test_group_names_and_rates() -> None:
    arguments = (
        "train_t5xxl=True",
        "loraplus_unet_lr_ratio=4",
        "network_reg_lrs=single_blocks_0=5e-5,mod_lin=0",
    )
    handle = applied(Rig(), config("networks.lora_flux", arguments))
    groups = handle.parameter_groups(learning_rate=1e-3, unet_lr=2e-3, text_encoder_lr=(1e-4, 3e-4))
    assert [(group.name, group.lr) for group in groups] == [
        ("textencoder 1", 1e-4),
        ("textencoder 2", 3e-4),
        ("unet reg_lr_0", 5e-5),
        ("unet reg_lr_0 plus", pytest.approx(2e-4)),
        ("unet", 2e-3),
        ("unet plus", 8e-3),
    ]
    frozen = [name for name, p in handle.module.named_parameters() if not p.requires_grad]
    assert frozen
    assert all("mod_lin" in name for name in frozen)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, (1e-3, 1e-3)),
        ((), (1e-3, 1e-3)),
        ((5e-4,), (5e-4, 5e-4)),
        ((5e-4, 1e-5), (5e-4, 1e-5)),
        ((0.0, 1e-5), (1e-5,)),
    ],
)
def test_text_encoder_rates(given: tuple[float, ...] | None, expected: tuple[float, ...]) -> None:
    handle = applied(Rig(), config("networks.lora_flux", ("train_t5xxl=1",)))
    groups = handle.parameter_groups(learning_rate=1e-3, unet_lr=0.0, text_encoder_lr=given)
    assert tuple(group.lr for group in groups) == expected


def test_lycoris_takes_the_first_text_rate_and_lists_parameters() -> None:
    handle = applied(Rig(), config("lycoris.kohya", ("algo=lora",)))
    groups = handle.parameter_groups(learning_rate=1e-3, unet_lr=None, text_encoder_lr=(1e-4, 3e-4))
    assert [(group.name, group.lr) for group in groups] == [("textencoder", 1e-4), ("unet", 1e-3)]
    assert all(isinstance(group.params, tuple) for group in groups)


def test_no_rate_at_all_is_an_error() -> None:
    handle = applied(Rig(), config("networks.lora_flux"))
    with pytest.raises(NetworkPluginError, match="nothing to train"):
        handle.parameter_groups(learning_rate=0.0, unet_lr=None, text_encoder_lr=None)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("networks.lora", "networks.lora_flux"),
        ("networks.dylora", "networks.lora_flux"),
        ("no_such_module.kohya", "was not found"),
        ("networks.nothing", "was not found"),
        ("json", "lacks create_network and create_network_from_weights"),
        (None, "network_module is not set"),
    ],
)
def test_modules_that_cannot_be_used(name: str | None, sentence: str) -> None:
    with pytest.raises(NetworkPluginError, match=sentence):
        load_plugin(name)


def test_a_bare_name_is_looked_up_in_our_own_folder() -> None:
    assert load_plugin("lora_flux").name == "networks.lora_flux"


def test_a_package_that_the_module_needs_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "thirsty_network.py").write_text("import a_package_nobody_has\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(NetworkPluginError, match="thirsty_network needs the package a_package_nobody_has"):
        load_plugin("thirsty_network")


def register(monkeypatch: pytest.MonkeyPatch, network: type[nn.Module]) -> str:
    module = types.ModuleType("a_third_network")
    module.create_network = lambda *positional, **named: network()
    module.create_network_from_weights = lambda *positional, **named: (network(), {})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module.__name__


class TwoRates(nn.Module):
    """A network of the older form: two learning rates by position, groups without names."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[object] = []

    def prepare_network(self, args: OptionsView) -> None:
        self.seen.append(args.seed)
        args.seed = 1

    def apply_to(
        self, text_encoder: list, unet: nn.Module, apply_text_encoder: bool, apply_unet: bool
    ) -> None:
        linear = unet.img_in
        forward = linear.forward
        linear.forward = lambda x: forward(x) + self.weight

    def prepare_optimizer_params(self, text_encoder_lr: float, unet_lr: float) -> list[dict]:
        self.seen.append((text_encoder_lr, unet_lr))
        return [{"params": iter([self.weight]), "lr": unet_lr}]

    def prepare_grad_etc(self, text_encoder: object, unet: object) -> None:
        pass

    def on_epoch_start(self, text_encoder: object, unet: object) -> None:
        self.train()

    def get_trainable_params(self) -> object:
        return self.parameters()

    def load_weights(self, file: str) -> None:
        pass

    def save_weights(self, file: str, dtype: object, metadata: dict) -> None:
        metadata["own"] = "1"
        Path(file).write_text(",".join(sorted(metadata)))


@pytest.mark.parametrize(
    ("groups", "unet_only", "names"),
    [
        (1, True, ["unet"]),
        (1, False, ["unet"]),
        (2, False, ["textencoder", "unet"]),
        (3, False, ["textencoder", "group0", "group1"]),
        (3, True, ["group0", "group1", "group2"]),
    ],
)
def test_groups_without_names_get_those_kohya_logs_them_under(
    monkeypatch: pytest.MonkeyPatch, groups: int, unet_only: bool, names: list[str]
) -> None:
    class Several(TwoRates):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.ParameterList(torch.zeros(1) for _ in range(groups))

        def prepare_optimizer_params(self, text_encoder_lr: float, unet_lr: float) -> list[dict]:
            return [{"params": [one], "lr": unet_lr} for one in self.more]

    handle = applied(Rig(), config(register(monkeypatch, Several), network_train_unet_only=unet_only))
    made = handle.parameter_groups(learning_rate=1e-3, unet_lr=None, text_encoder_lr=None)
    assert [group.name for group in made] == names


def test_the_arity_of_an_older_network_is_read_from_its_signature(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    handle = applied(Rig(), config(register(monkeypatch, TwoRates)))
    groups = handle.parameter_groups(learning_rate=1e-3, unet_lr=None, text_encoder_lr=(1e-4,))
    assert handle.module.seen == [(1e-4, 1e-3)]
    assert [(group.name, group.lr) for group in groups] == [("unet", 1e-3)]
    assert not handle.trains_t5
    assert handle.apply_max_norm(1.0) is None
    assert handle.norms() == {}
    handle.on_step_start()
    with pytest.raises(NetworkPluginError, match="set_multiplier"):
        handle.set_multiplier(0.0)
    metadata = {"ss_seed": "1"}
    handle.save(tmp_path / "x.bin", dtype=None, metadata=metadata)
    assert (tmp_path / "x.bin").read_text() == "own,ss_seed"
    assert metadata == {"ss_seed": "1"}


def test_options_are_shown_but_cannot_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    handle = create(config(register(monkeypatch, TwoRates)), text_encoders=[], transformer=TinyFlux())
    with pytest.raises(NetworkPluginError, match="option seed"):
        handle.prepare({"seed": 7})
    assert handle.module.seen == [7]


class Unfinished(TwoRates):
    load_weights = None
    on_epoch_start = None


def test_missing_methods_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = config(register(monkeypatch, Unfinished))
    with pytest.raises(NetworkPluginError, match="lacks on_epoch_start, load_weights"):
        create(settings, text_encoders=[], transformer=TinyFlux())


@pytest.mark.parametrize("module", ["networks.lora_flux", "lycoris.kohya"])
def test_a_model_without_known_blocks_is_described(module: str) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.GELU())
    handle = create(config(module), text_encoders=[], transformer=model)
    with pytest.raises(NetworkPluginError, match=r"found nothing to train.*1 Linear"):
        handle.apply()


def test_lycoris_cannot_train_t5() -> None:
    rig = Rig()
    handle = create(
        config("lycoris.kohya", ("train_t5xxl=True",)), text_encoders=rig.text_encoders, transformer=rig.flux
    )
    with pytest.raises(NetworkPluginError, match="no target in T5"):
        handle.apply()


def test_arguments_are_kohyas_strings_and_lycoris_flags_mean_what_they_say() -> None:
    settings = config("lycoris.kohya", ("algo=lokr", "decompose_both=False", "dora_wd=0", "factor=4=x"))
    arguments = network_arguments(settings, load_plugin("lycoris.kohya"))
    assert arguments == {
        "algo": "lokr", "decompose_both": False, "dora_wd": False, "factor": "4=x", "dropout": None,
    }  # fmt: skip
    with pytest.raises(NetworkPluginError, match="key=value"):
        network_arguments(config("networks.lora_flux", ("train_t5xxl",)), load_plugin("networks.lora_flux"))


@pytest.mark.parametrize("option", ["base_weights", "network_weights"])
def test_files_that_do_not_exist_are_named(option: str, tmp_path: Path) -> None:
    missing = tmp_path / "none.safetensors"
    value = (missing,) if option == "base_weights" else missing
    settings = config("networks.lora_flux", **{option: value})
    rig = Rig()

    def start() -> None:
        merge_base_weights(settings, text_encoders=rig.text_encoders, transformer=rig.flux)
        applied(rig, settings)

    with pytest.raises(NetworkPluginError, match=f"{option} .*none.safetensors does not exist"):
        start()
