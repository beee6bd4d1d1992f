"""Finding a network module by name and calling it with Kohya's arguments.

What is particular to one foreign module is said here, with its reason, and nowhere else. A module is
imported and its functions are checked before any weight is needed.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from library.errors import NetworkPluginError
from library.log import warn_once
from networks.options import parse_bool

if TYPE_CHECKING:
    from library.config.sections.network import NetworkConfig

logger = logging.getLogger(__name__)

# Modules of Kohya's trainer for other models: what people copy from SD and SDXL recipes.
_OTHER_MODELS = frozenset(
    f"networks.{name}"
    for name in (
        "lora",
        "lora_fa",
        "dylora",
        "oft",
        "oft_flux",
        "lora_sd3",
        "lora_lumina",
        "control_net_lllite",
    )
)
_LYCORIS = "lycoris"
# LyCORIS reads "0" and "no" as true, and does not convert decompose_both: "False" switches it on.
_LYCORIS_FLAGS = frozenset(
    {
        "use_tucker", "use_cp", "use_conv_cp", "use_scalar", "train_norm", "rescaled", "dora_wd",
        "wd_on_output", "full_matrix", "bypass_mode", "rs_lora", "unbalanced_factorization", "decompose_both",
        "train_t5xxl",
    }
)  # fmt: skip
# Modules whose two ways of computing agree: beside the layer ("bypass"), or by rebuilding its weight.
_LYCORIS_BESIDE = frozenset({"LoConModule", "LohaModule", "LokrModule", "GLoRAModule"})
_EIGHT_BITS = (torch.float8_e4m3fn, torch.float8_e5m2)
_REQUIRED_FUNCTIONS = ("create_network", "create_network_from_weights")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plugin:
    """A network module that has what is needed."""

    name: str
    create_network: Callable[..., Any]
    check_arguments: Callable[[Mapping[str, object]], None] | None  # optional: of network_args alone
    create_network_from_weights: Callable[..., Any]

    @property
    def is_lycoris(self) -> bool:
        """Whether it is LyCORIS, whose `merge_to` cannot be used (see `networks.interface`)."""
        return self.name.split(".")[0] == _LYCORIS


def load_plugin(name: str | None) -> Plugin:
    """Import the network module `name`, from our own folder or installed, and check its functions.

    Raises `NetworkPluginError` that says what is missing.
    """
    if not name:
        raise NetworkPluginError("network_module is not set; give networks.lora_flux or lycoris.kohya")
    if "." not in name and importlib.util.find_spec(f"networks.{name}") is not None:
        name = f"networks.{name}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise NetworkPluginError(_import_sentence(name, error)) from error
    missing = [function for function in _REQUIRED_FUNCTIONS if not callable(getattr(module, function, None))]
    if missing:
        raise NetworkPluginError(
            f"network_module {name} lacks {' and '.join(missing)}; it is no network module of this kind"
        )
    return Plugin(
        name=name,
        create_network=module.create_network,
        create_network_from_weights=module.create_network_from_weights,
        check_arguments=getattr(module, "check_arguments", None),
    )


def check(config: NetworkConfig) -> None:
    """Raise what can be known to be wrong before any model is there: the module, its functions, network_args."""
    plugin = load_plugin(config.network_module)
    arguments = network_arguments(config, plugin)
    if plugin.check_arguments is not None:
        plugin.check_arguments(arguments)


def _import_sentence(name: str, error: ModuleNotFoundError) -> str:
    missing = error.name or ""
    if name in _OTHER_MODELS:
        return (
            f"network_module {name} is for other models than FLUX; give networks.lora_flux or lycoris.kohya"
        )
    if name == missing or name.startswith(f"{missing}."):
        package = name.split(".")[0]
        hint = (
            "pip install lycoris-lora" if package == _LYCORIS else "give networks.lora_flux or lycoris.kohya"
        )
        return f"network_module {name} was not found; {hint}"
    return f"network_module {name} needs the package {missing}, which is not installed"


def network_arguments(config: NetworkConfig, plugin: Plugin) -> dict[str, object]:
    """`network_args` as keyword arguments: strings, and `dropout`, which Kohya adds for LyCORIS."""
    arguments: dict[str, object] = {}
    for entry in config.network_args:
        key, equals, value = entry.partition("=")
        if not equals:
            raise NetworkPluginError(f"network_args {entry!r} is not of the form key=value")
        flag = plugin.is_lycoris and key in _LYCORIS_FLAGS and value != ""
        arguments[key] = parse_bool(key, value) if flag else value
    arguments.setdefault("dropout", config.network_dropout)
    return arguments


def metadata_arguments(config: NetworkConfig) -> dict[str, str | float | None] | None:
    """What `ss_network_args` holds: the strings and `dropout`, or None when no network_args were given."""
    if not config.network_args:
        return None
    pairs = [entry.partition("=") for entry in config.network_args]
    arguments: dict[str, str | float | None] = {key: value for key, _, value in pairs}
    arguments.setdefault("dropout", config.network_dropout)
    return arguments


def create_module(
    plugin: Plugin,
    config: NetworkConfig,
    *,
    multiplier: float,
    text_encoders: Sequence[nn.Module],
    transformer: nn.Module,
    ae: nn.Module | None,
) -> nn.Module:
    """Call `create_network`, or with dim_from_weights `create_network_from_weights`, as Kohya does."""
    arguments = network_arguments(config, plugin)
    if config.dim_from_weights and config.network_weights is None:
        raise NetworkPluginError("dim_from_weights needs network_weights, the file to take the ranks from")
    # Text encoders go as a list: LyCORIS numbers their names only then.
    encoders = list(text_encoders)
    if config.dim_from_weights:
        file = str(config.network_weights)
        network, _ = plugin.create_network_from_weights(1, file, ae, encoders, transformer, **arguments)
    else:
        if "warn_on_unmatched" in inspect.signature(plugin.create_network).parameters:
            # Its targets cover many models; for FLUX most of them never match.
            arguments.setdefault("warn_on_unmatched", False)
        network = plugin.create_network(
            multiplier,
            config.network_dim,
            config.network_alpha,
            ae,
            encoders,
            transformer,
            neuron_dropout=config.network_dropout,
            **arguments,
        )
    if not isinstance(network, nn.Module):
        raise NetworkPluginError(f"network_module {plugin.name} made no network ({network!r})")
    if plugin.is_lycoris:
        _compute_beside_the_layer(network, asked="bypass_mode" in arguments)
    return network


def _compute_beside_the_layer(network: Any, *, asked: bool) -> None:
    """Have LyCORIS add its product to the layer's output where it can, unless network_args chose (`asked`).

    By default it rebuilds the layer's weight and takes the difference in that weight's dtype: in bfloat16 a
    change below 1/256 of a weight is rounded away, 8-bit weights cannot be added to at all, and the
    difference, as large as the weight, is kept for the backward pass. Where it has to rebuild (DoRA, its
    rank_dropout, other algorithms), 8-bit weights are refused and 16-bit ones warned of.

    Raises `NetworkPluginError` for what cannot work.
    """
    for module in (*network.text_encoder_loras, *network.unet_loras):
        decomposed, kind = getattr(module, "wd", False), type(module).__name__
        if kind in _LYCORIS_BESIDE and not asked and not decomposed and not module.rank_dropout:
            module.bypass_mode = True
        if decomposed and module.bypass_mode:
            raise NetworkPluginError(
                "network_args: bypass_mode=True leaves dora_wd without effect; drop one of them"
            )
        weight = getattr(module.org_module[0], "weight", None)
        if module.bypass_mode or weight is None:
            continue
        if weight.dtype in _EIGHT_BITS:
            raise NetworkPluginError(
                f"LyCORIS's {kind} rebuilds base weights with these network_args, which fp8_base's 8 bits do "
                "not allow; drop fp8_base, or use algo=lokr, loha, glora or locon without dora_wd and rank_dropout"
            )
        if weight.dtype in (torch.bfloat16, torch.float16):
            warn_once(
                logger,
                "LyCORIS's %s adds to base weights in 16 bits, where small changes are rounded away; "
                "algo=lokr, loha, glora or locon without dora_wd and rank_dropout do not",
                kind,
            )


def loaded_values(report: object) -> Mapping[str, Sequence[str]]:
    """What `load_weights` says of keys that did not fit: torch's named tuple, or LyCORIS's dictionary."""
    if isinstance(report, Mapping):
        return {str(key): list(value) for key, value in report.items()}
    missing, unexpected = getattr(report, "missing_keys", None), getattr(report, "unexpected_keys", None)
    return {"missing keys": list(missing or ()), "unexpected keys": list(unexpected or ())}
