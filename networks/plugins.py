"""Finding a network module by name and calling it with Kohya's arguments.

A module is imported and its functions are checked before any weight is needed. What is particular to LyCORIS is in
`networks.lycoris_fit`.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from torch import nn

from library.errors import NetworkPluginError
from networks import lycoris_fit, weights

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
        "lora_sd3",
        "lora_lumina",
        "control_net_lllite",
    )
)
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
        return self.name.split(".")[0] == lycoris_fit.PACKAGE


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
    if plugin.is_lycoris:
        lycoris_fit.inline_preset(arguments)
        for remark in lycoris_fit.remarks(arguments):
            logger.warning(remark)


def _import_sentence(name: str, error: ModuleNotFoundError) -> str:
    missing = error.name or ""
    if name in _OTHER_MODELS:
        return (
            f"network_module {name} is for other models than FLUX; give networks.lora_flux or lycoris.kohya"
        )
    if name == missing or name.startswith(f"{missing}."):
        package = name.split(".")[0]
        hint = (
            "pip install lycoris-lora"
            if package == lycoris_fit.PACKAGE
            else "give networks.lora_flux or lycoris.kohya"
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
        arguments[key] = value
    arguments.setdefault("dropout", config.network_dropout)
    return lycoris_fit.read_arguments(arguments) if plugin.is_lycoris else arguments


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
        network = network_from_file(
            plugin, Path(str(config.network_weights)), strength=1.0, text_encoders=encoders,
            transformer=transformer, ae=ae, arguments=arguments,
        )  # fmt: skip
    else:
        if "warn_on_unmatched" in inspect.signature(plugin.create_network).parameters:
            # Its targets cover many models; for FLUX most of them never match.
            arguments.setdefault("warn_on_unmatched", False)
        dim = config.network_dim or lycoris_fit.DEFAULT_DIM
        models = [transformer, *encoders]
        fit = lycoris_fit.targets(arguments, dim=dim, models=models) if plugin.is_lycoris else None
        with fit or nullcontext(arguments) as read:
            network = plugin.create_network(
                multiplier,
                config.network_dim,
                config.network_alpha,
                ae,
                encoders,
                transformer,
                neuron_dropout=config.network_dropout,
                **read,
            )
    if not isinstance(network, nn.Module):
        raise NetworkPluginError(f"network_module {plugin.name} made no network ({network!r})")
    if plugin.is_lycoris:
        lycoris_fit.settle(network, asked_bypass="bypass_mode" in arguments)
    return network


def network_from_file(
    plugin: Plugin,
    file: Path,
    *,
    strength: float,
    text_encoders: list[nn.Module],
    transformer: nn.Module,
    ae: nn.Module | None = None,
    arguments: Mapping[str, object] = MappingProxyType({}),
) -> Any:
    """The network that an adapter file holds, with its ranks; not yet applied."""
    if plugin.is_lycoris:
        return lycoris_fit.from_file(
            plugin.create_network_from_weights, weights.read(file), strength=strength,
            text_encoders=text_encoders, transformer=transformer,
        )  # fmt: skip
    network, _ = plugin.create_network_from_weights(
        strength, str(file), ae, text_encoders, transformer, **arguments
    )
    return network


def loaded_values(report: object) -> Mapping[str, Sequence[str]]:
    """What `load_weights` says of keys that did not fit: torch's named tuple, or LyCORIS's dictionary."""
    if isinstance(report, Mapping):
        return {str(key): list(value) for key, value in report.items()}
    missing, unexpected = getattr(report, "missing_keys", None), getattr(report, "unexpected_keys", None)
    return {"missing keys": list(missing or ()), "unexpected keys": list(unexpected or ())}


def group_names(count: int, *, with_text: bool, with_transformer: bool) -> list[str]:
    """Kohya's names of parameter groups that a network leaves nameless; of several the first is the text encoders'."""
    if count == 1:
        return ["unet" if with_transformer else "textencoder"]
    rest = count - with_text
    others = ["unet"] * rest if count <= 2 else [f"group{number}" for number in range(rest)]
    return ["textencoder", *others] if with_text else others
