"""The adapter under training, whatever module it comes from: the only file that knows that plug-ins differ.

Kohya's trainer finds out while it runs what a network can do; here it is probed once, when the network is
made, and the trainer holds a `NetworkHandle`. A network replaces the `forward` of Linear layers, so: apply
it before the model is sharded or compiled, do not replace `forward` or modules afterwards, and do not
deep-copy the model.

    handle = create(config, text_encoders=[clip, t5], transformer=flux)  # also on the meta device
    handle.apply()  # takes effect; then loads network_weights
    groups = handle.parameter_groups(learning_rate=1e-4, unet_lr=None, text_encoder_lr=None)
"""

from __future__ import annotations

import inspect
import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from library.errors import NetworkPluginError
from library.files.atomic import replacing
from networks import lycoris_fit, weights
from networks.merge import merge_measured
from networks.plugins import Plugin, create_module, group_names, load_plugin, loaded_values, network_from_file

if TYPE_CHECKING:
    from library.config.sections.network import NetworkConfig

logger = logging.getLogger(__name__)

FLUX_MODULE = "networks.lora_flux"
_REQUIRED_METHODS = (
    "apply_to",
    "prepare_optimizer_params",
    "prepare_grad_etc",
    "on_epoch_start",
    "get_trainable_params",
    "load_weights",
    "save_weights",
)
_OPTIONAL_METHODS = (
    "prepare_network",
    "prepare_optimizer_params_with_multiple_te_lrs",
    "enable_gradient_checkpointing",
    "on_step_start",
    "apply_max_norm_regularization",
    "set_multiplier",
    "update_norms",
    "update_grad_norms",
    "weight_norms",
    "grad_norms",
    "combined_weight_norms",
)
# Kohya's tags of the norms a network may report, by the method that reports them.
_NORM_TAGS = {
    "weight_norms": "norm/avg_key_norm",
    "grad_norms": "norm/avg_grad_norm",
    "combined_weight_norms": "norm/avg_combined_norm",
}


@dataclass(frozen=True, slots=True)
class ParameterGroup:
    """Parameters that share a learning rate; `name` is what logs call it, such as "unet plus"."""

    name: str
    params: tuple[nn.Parameter, ...]
    lr: float


@dataclass(frozen=True, slots=True)
class NormReport:
    """What scale_weight_norms did: how many layers it shrank, and the norms after."""

    scaled: int
    mean: float
    maximum: float


class OptionsView:
    """The options as attributes, as Kohya's networks read them from its namespace; writing is refused."""

    def __init__(self, values: Mapping[str, object]) -> None:
        object.__setattr__(self, "_values", values)

    def __getattr__(self, name: str) -> object:
        values: Mapping[str, object] = object.__getattribute__(self, "_values")
        if name not in values:
            raise AttributeError(name)
        return values[name]

    def __setattr__(self, name: str, value: object) -> None:
        raise NetworkPluginError(
            f"the network module tried to change the option {name}; options are fixed by then"
        )


class NetworkHandle:
    """One network and what it can do, made by `create`; `module` is what is trained and saved."""

    def __init__(
        self,
        module: nn.Module,
        *,
        plugin: Plugin,
        config: NetworkConfig,
        text_encoders: Sequence[nn.Module],
        transformer: nn.Module,
    ) -> None:
        missing = [name for name in _REQUIRED_METHODS if not callable(getattr(module, name, None))]
        if missing:
            raise NetworkPluginError(f"the network of {plugin.name} lacks {', '.join(missing)}")
        self.module = module
        self._plugin = plugin
        self._config = config
        self._text_encoders = list(text_encoders)
        self._transformer = transformer
        self._methods: dict[str, Callable[..., Any]] = {
            name: getattr(module, name)
            for name in (*_REQUIRED_METHODS, *_OPTIONAL_METHODS)
            if callable(getattr(module, name, None))
        }

    @property
    def trains_clip_l(self) -> bool:
        """Whether CLIP-L is trained: unless network_train_unet_only."""
        return not self._config.network_train_unet_only

    @property
    def trains_t5(self) -> bool:
        """Whether T5 is trained: only where the network says so (`train_t5xxl`), and never by default."""
        return self.trains_clip_l and bool(getattr(self.module, "train_t5xxl", False))

    @property
    def trains_transformer(self) -> bool:
        """Whether the transformer is trained: unless network_train_text_encoder_only."""
        return not self._config.network_train_text_encoder_only

    @property
    def single_text_encoder_lr(self) -> bool:
        """Whether all text encoders get the first rate of text_encoder_lr."""
        return "prepare_optimizer_params_with_multiple_te_lrs" not in self._methods

    def prepare(self, options: Mapping[str, object]) -> None:
        """Show the network all options by flat name, read only, if it asks for them."""
        if "prepare_network" in self._methods:
            self._methods["prepare_network"](OptionsView(options))

    def apply(self) -> None:
        """Put the network in effect and load network_weights.

        Raises `NetworkPluginError` when it matches nothing in what is to be trained, or claims to train a
        T5 that it leaves alone.
        """
        before = [_state(model) for model in (self._transformer, *self._text_encoders)]
        with_text = self.trains_clip_l and bool(self._text_encoders)
        self._methods["apply_to"](self._text_encoders, self._transformer, with_text, self.trains_transformer)
        after = [_state(model) for model in (self._transformer, *self._text_encoders)]
        if before == after or next(self.module.parameters(), None) is None:
            raise NetworkPluginError(
                f"{self._plugin.name} found nothing to train: {self._what_would_match()}"
            )
        if self.trains_t5 and len(after) > 2 and before[2] == after[2]:
            raise NetworkPluginError(
                f"network_args train_t5xxl=True, but {self._plugin.name} has no target in T5; "
                f"leave it out, or give network_module = networks.lora_flux"
            )
        if self._config.network_weights is not None:
            self.load(Path(self._config.network_weights))

    def _what_would_match(self) -> str:
        hint = "check network_args and the class names it looks for"
        if self._plugin.is_lycoris:
            hint = f"its preset matches no layer; presets that match some of FLUX's are {lycoris_fit.PRESETS}"
        return f"{hint}; the transformer has {_contents(self._transformer)}"

    def parameter_groups(
        self, *, learning_rate: float, unet_lr: float | None, text_encoder_lr: Sequence[float] | None
    ) -> list[ParameterGroup]:
        """What the optimizer gets; call after `apply`. Parameters in no group are frozen.

        Rates are per optimizer step. `text_encoder_lr`: None or empty is `learning_rate`, one is both
        encoders', two are CLIP-L's and T5's; a network that takes one rate gets the first. A group with
        rate 0 is left out, and `NetworkPluginError` raised when none remains.
        """
        self._methods["prepare_grad_etc"](self._text_encoders, self._transformer)
        rates = list(text_encoder_lr or ()) or [learning_rate]
        returned = self._ask_for_groups(rates, unet_lr, learning_rate)
        given, names = returned if isinstance(returned, tuple) else (returned, [])
        raw = list(given)
        with_text = self.trains_clip_l and bool(self._text_encoders)
        unnamed = group_names(len(raw), with_text=with_text, with_transformer=self.trains_transformer)
        groups = []
        for position, group in enumerate(raw):
            rate = group.get("lr", learning_rate)
            name = names[position] if position < len(names) else unnamed[position]
            params = tuple(parameter for parameter in group["params"] if parameter.requires_grad)
            if params and rate:
                groups.append(ParameterGroup(name=" ".join(name.split()), params=params, lr=float(rate)))
        if not groups:
            raise NetworkPluginError("nothing to train: learning_rate, unet_lr and text_encoder_lr are 0")
        trained = {id(parameter) for group in groups for parameter in group.params}
        for parameter in self.module.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        return groups

    def _ask_for_groups(self, rates: list[float], unet_lr: float | None, learning_rate: float) -> Any:
        several = self._methods.get("prepare_optimizer_params_with_multiple_te_lrs")
        unet_rate = learning_rate if unet_lr is None else unet_lr
        if several is not None:
            return several(rates * 2 if len(rates) == 1 else rates, unet_rate, learning_rate)
        single = self._methods["prepare_optimizer_params"]
        arguments = (rates[0], unet_rate, learning_rate)
        return single(*arguments[: min(3, _positional(single))])

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The network's parameters that have a gradient."""
        return [parameter for parameter in self._methods["get_trainable_params"]() if parameter.requires_grad]

    def save(self, path: Path, *, dtype: torch.dtype | None, metadata: Mapping[str, str] | None) -> None:
        """Write the adapter file whole; `dtype` None keeps the training dtype. Hashes are added."""
        with replacing(path) as temporary:
            # A fresh dictionary, as some networks write their hashes into it.
            self._methods["save_weights"](str(temporary), dtype, dict(metadata or {}))

    def load(self, path: Path) -> None:
        """Load an adapter file into the network; what does not fit is named in the log."""
        if not path.is_file():
            raise NetworkPluginError(f"network_weights {path} does not exist")
        lycoris_fit.before_loading(self.module)
        for what, keys in loaded_values(self._methods["load_weights"](str(path))).items():
            if keys:
                logger.warning("%s: %d %s: %s", path, len(keys), what, ", ".join(keys[:5]))

    def set_multiplier(self, multiplier: float) -> None:
        """Scale what the network adds; raises `NetworkPluginError` if it cannot."""
        if "set_multiplier" not in self._methods:
            raise NetworkPluginError(
                f"{self._plugin.name} cannot change its strength (it lacks set_multiplier)"
            )
        self._methods["set_multiplier"](multiplier)

    def enable_gradient_checkpointing(self) -> None:
        """Tell the network that blocks are recomputed, if it wants to know."""
        if "enable_gradient_checkpointing" in self._methods:
            self._methods["enable_gradient_checkpointing"]()

    def on_epoch_start(self) -> None:
        """At the start of an epoch; puts the network in training mode."""
        self._methods["on_epoch_start"](self._text_encoders, self._transformer)

    def on_step_start(self) -> None:
        """Before each micro-step."""
        if "on_step_start" in self._methods:
            self._methods["on_step_start"](self._text_encoders, self._transformer)

    def on_gradients(self) -> None:
        """When an optimizer step's gradients are complete, before they are cleared (GGPO reads them here)."""
        for name in ("update_grad_norms", "update_norms"):
            if name in self._methods:
                self._methods[name]()

    def norms(self) -> dict[str, Tensor]:
        """Norms [], left on the device, that the network reports by Kohya's tags; empty when it has none."""
        report = {}
        for name, tag in _NORM_TAGS.items():
            norms = self._methods[name]() if name in self._methods else None
            if norms is not None:
                report[tag] = norms.mean()
        return report

    @property
    def limits_norms(self) -> bool:
        """Whether scale_weight_norms has an effect on it."""
        has = "apply_max_norm_regularization" in self._methods
        return has and (not self._plugin.is_lycoris or lycoris_fit.limits_norms(self.module))

    def apply_max_norm(self, maximum: float) -> NormReport | None:
        """scale_weight_norms: shrink layers whose norm is above `maximum`; None if the network cannot."""
        method = self._methods.get("apply_max_norm_regularization")
        if method is None:
            return None
        device = next(self.module.parameters()).device
        scaled, mean, largest = method(maximum, device)
        return NormReport(scaled=int(scaled), mean=float(mean), maximum=float(largest))


def create(
    config: NetworkConfig,
    *,
    text_encoders: Sequence[nn.Module],
    transformer: nn.Module,
    ae: nn.Module | None = None,
    multiplier: float = 1.0,
) -> NetworkHandle:
    """Make the network that `config` asks for; `text_encoders` is [CLIP-L, T5], or empty if untrained.

    Models may be on the meta device. Initial numbers come from torch's global generator: seed it, alike on
    every rank. Raises `NetworkPluginError` for a module that is missing or lacks a function.
    """
    plugin = load_plugin(config.network_module)
    module = create_module(
        plugin, config, multiplier=multiplier, text_encoders=text_encoders, transformer=transformer, ae=ae
    )
    return NetworkHandle(
        module, plugin=plugin, config=config, text_encoders=text_encoders, transformer=transformer
    )


def merge_base_weights(
    config: NetworkConfig,
    *,
    text_encoders: Sequence[nn.Module],
    transformer: nn.Module,
    ae: nn.Module | None = None,
) -> None:
    """Add the files of `base_weights` to the models' weights, in order; before `create`.

    Strengths are `base_weights_multiplier`, 1 where it is short.
    """
    if not config.base_weights:
        return
    models = [transformer, *text_encoders]
    strengths = [*config.base_weights_multiplier, *(1.0 for _ in config.base_weights)]
    for file, strength in zip(config.base_weights, strengths, strict=False):
        if not Path(file).is_file():
            raise NetworkPluginError(f"base_weights {file} does not exist")
        plugin = load_plugin(module_of(config, Path(file)))
        module = network_from_file(
            plugin, Path(file), strength=strength, text_encoders=list(text_encoders), transformer=transformer,
            ae=ae, arguments={"for_inference": True},
        )  # fmt: skip
        if plugin.is_lycoris:
            lycoris_fit.settle(module, asked_bypass=False)
            lycoris_fit.merge_full(module, strength)
        if hasattr(module, "merge_to") and not plugin.is_lycoris:
            module.merge_to(list(text_encoders), transformer, None, None, None)
        else:
            _merge_by_measuring(module, models, list(text_encoders), plugin)
        logger.info("merged %s at strength %g", file, strength)


def module_of(config: NetworkConfig, file: Path) -> str | None:
    """The module that a file of base_weights is read with: the run's own, or LyCORIS for what only it knows."""
    if config.network_module == FLUX_MODULE and not weights.is_plain_lora(weights.read(file)):
        return "lycoris.kohya"
    return config.network_module


def _merge_by_measuring(
    module: Any, models: Sequence[nn.Module], text_encoders: list[nn.Module], plugin: Plugin
) -> None:
    """Merge a network without using its own `merge_to`.

    LyCORIS 4.1.3's merges at strength 1 whatever the multiplier and scales a LoKr by alpha / rank twice.
    """
    layers = [layer for model in models for layer in model.modules()]
    before = [dict(vars(layer)) for layer in layers]
    module.apply_to(text_encoders, models[0], bool(text_encoders), True)
    device = next(models[0].parameters()).device
    module.eval().to(device)
    for layer, kept in zip(layers, before, strict=True):
        if vars(layer).get("forward") is kept.get("forward"):
            continue
        if not isinstance(layer, nn.Linear):
            raise NetworkPluginError(
                f"base_weights of {plugin.name} change a {type(layer).__name__}; only Linear can be merged"
            )
        merge_measured(layer, device)
        for name in vars(layer).keys() - kept.keys():
            delattr(layer, name)
        vars(layer).update({name: value for name, value in kept.items() if name == "forward"})


def _positional(method: Callable[..., Any]) -> int:
    """How many arguments a bound method takes by position."""
    kinds = [parameter.kind for parameter in inspect.signature(method).parameters.values()]
    if inspect.Parameter.VAR_POSITIONAL in kinds:
        return 3
    allowed = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return sum(kind in allowed for kind in kinds)


def _state(model: nn.Module) -> list[tuple[str, type, int, int]]:
    """What tells whether a network took hold of a model: its classes, replaced forwards and hooks."""
    return [
        (name, type(module), id(vars(module).get("forward")), len(module._forward_hooks))
        for name, module in model.named_modules()
    ]


def _contents(model: nn.Module) -> str:
    counts = Counter(type(module).__name__ for module in model.modules())
    return ", ".join(f"{count} {name}" for name, count in counts.most_common(12))
