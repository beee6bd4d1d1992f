"""LoRA for FLUX.1 under Kohya's module name and interface: `network_module = networks.lora_flux`.

The functions and methods have Kohya's names and positions, because the trainer and other tools call every
network module through them; `networks.interface` is the only caller in this project. Finding layers is
`networks.targets`, the maths `networks.layers`, files `networks.weights`.

Initial numbers come from torch's global generator, as with every module of this kind; the caller seeds it,
the same on every rank.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import CheckpointError
from networks import weights
from networks.ggpo import Perturbation
from networks.layers import Dropouts, LoRALinear, diagonal_blocks
from networks.options import LoRAOptions, parse
from networks.targets import (
    CLIP_L,
    T5,
    UNET,
    Candidate,
    Target,
    candidates,
    check_block_indices,
    check_names,
    rank_rule,
    select,
    split_rows,
)

logger = logging.getLogger(__name__)

DEFAULT_DIM = 4
# File prefix -> the name of its parameter groups, in the order of the groups.
_COMPONENTS = ((CLIP_L, "textencoder 1"), (T5, "textencoder 2"), (UNET, "unet"))


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: object,
    text_encoder: Sequence[nn.Module],
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: object,
) -> LoRANetwork:
    """A fresh network on the Linear layers of `unet` (the transformer) and `text_encoder` ([CLIP-L, T5]).

    `kwargs` are `network_args`; see `networks.options`. `vae` is not used. Works on models on the meta
    device.
    """
    options = parse(kwargs)
    dim = DEFAULT_DIM if network_dim is None else int(network_dim)
    check_block_indices(options, unet)
    found = candidates(unet, _encoders(text_encoder), blocks=options.train_blocks, t5=options.train_t5xxl)
    targets = select(found, rank_rule(options, dim=dim), split_qkv=options.split_qkv)
    check_names(options, targets)
    alpha = 1.0 if network_alpha is None else float(network_alpha)
    return LoRANetwork(
        targets,
        alphas=[alpha] * len(targets),
        options=options,
        multiplier=float(multiplier),
        neuron_dropout=neuron_dropout,
    )


def check_arguments(arguments: Mapping[str, object]) -> None:
    """Raise `NetworkPluginError` for network_args that no model could make right."""
    parse(arguments)


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: object,
    text_encoder: Sequence[nn.Module],
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: object,
) -> tuple[LoRANetwork, dict[str, Tensor]]:
    """A network of the layers, ranks and alphas that a file (or `weights_sd`) has, loaded with its numbers.

    Dropouts, LoRA+ and per-layer learning rates in `kwargs` count; ranks and selections come from the file.
    With split_qkv, layers whose factors are split in the file stay split, others get one part rank each.
    """
    del vae, for_inference
    options = parse(kwargs)
    tensors = dict(weights_sd) if weights_sd is not None else weights.read(str(file))
    layers = weights.group(tensors, origin=str(file or "weights"))
    has_t5 = any(name.startswith(f"{T5}_") for name in layers)
    found = [c for c in candidates(unet, _encoders(text_encoder), t5=has_t5) if c.name in layers]
    targets = [_target_of(candidate, layers[candidate.name], split=options.split_qkv) for candidate in found]
    network = LoRANetwork(
        targets,
        alphas=[layers[c.name].alpha for c in found],
        options=options,
        multiplier=float(multiplier),
        neuron_dropout=None,
    )
    network.train_t5xxl = has_t5
    network.load_tensors(tensors, origin=str(file or "weights"))
    return network, tensors


def _target_of(candidate: Candidate, layer: weights.LayerWeights, *, split: bool) -> Target:
    parts = split_rows(candidate) if split else ()
    if parts and diagonal_blocks(layer.up, parts) is not None:
        return Target(candidate=candidate, rank=layer.rank // len(parts), parts=parts)
    return Target(candidate=candidate, rank=layer.rank, parts=parts)


def _encoders(given: Sequence[nn.Module] | nn.Module | None) -> list[nn.Module]:
    if given is None:
        return []
    return [given] if isinstance(given, nn.Module) else list(given)


class LoRANetwork(nn.Module):
    """The adapters of one run. They are registered as sub-modules under their file names once applied."""

    def __init__(
        self,
        targets: Sequence[Target],
        *,
        alphas: Sequence[float],
        options: LoRAOptions,
        multiplier: float,
        neuron_dropout: float | None,
    ) -> None:
        super().__init__()
        self.options = options
        self.multiplier = multiplier
        self.train_t5xxl = options.train_t5xxl
        self._reports_gradients = False
        self._gradient_norms: Tensor | None = None
        dropouts = Dropouts(
            activation=options.dropout if neuron_dropout is None else neuron_dropout,
            rank=options.rank_dropout,
            module=options.module_dropout,
        )
        made = [
            LoRALinear(target, alpha=alpha, dropouts=dropouts, multiplier=multiplier)
            for target, alpha in zip(targets, alphas, strict=True)
        ]
        self.unet_loras = [lora for lora in made if lora.lora_name.startswith(f"{UNET}_")]
        self.text_encoder_loras = [lora for lora in made if not lora.lora_name.startswith(f"{UNET}_")]
        if options.ggpo_sigma is not None and options.ggpo_beta is not None:
            for lora in self.unet_loras:
                lora.perturbation = Perturbation(
                    lora.linear, sigma=options.ggpo_sigma, beta=options.ggpo_beta
                )
        level = logging.INFO if options.verbose else logging.DEBUG
        for target, alpha in zip(targets, alphas, strict=True):
            rank = target.rank
            logger.log(level, "%s rank %d alpha %g", target.candidate.name, rank, alpha or rank)

    @property
    def loras(self) -> list[LoRALinear]:
        """All adapters, text encoders first."""
        return [*self.text_encoder_loras, *self.unet_loras]

    def prepare_network(self, args: object) -> None:
        """Take note of the options: gradients are measured where something logs their norms."""
        self._reports_gradients = any(getattr(args, name, None) for name in ("logging_dir", "log_with"))

    def apply_to(
        self,
        text_encoders: Sequence[nn.Module],
        unet: nn.Module,
        apply_text_encoder: bool = True,
        apply_unet: bool = True,
    ) -> None:
        """Put the adapters in effect; those of a side that is not trained are dropped."""
        self.text_encoder_loras = self.text_encoder_loras if apply_text_encoder else []
        self.unet_loras = self.unet_loras if apply_unet else []
        for lora in self.loras:
            lora.apply_to()
            self.add_module(lora.lora_name, lora)

    def set_multiplier(self, multiplier: float) -> None:
        """Scale what every adapter adds; 0 gives the base model."""
        self.multiplier = multiplier
        for lora in self.loras:
            lora.multiplier = multiplier

    def is_mergeable(self) -> bool:
        """A LoRA can always be added to the weights."""
        return True

    @torch.no_grad()
    def merge_to(
        self,
        text_encoders: Sequence[nn.Module],
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Add the adapters (loaded with `weights_sd`, if given) to the base weights, times the multiplier."""
        if weights_sd is not None:
            self.load_tensors(weights_sd, origin="weights")
        for lora in self.loras:
            lora.merge(dtype=dtype, device=device)

    def load_weights(self, file: str | Path) -> None:
        """Load a file into the adapters there are; what either side lacks is named and left."""
        self.load_tensors(weights.read(file), origin=str(file))

    def load_tensors(self, tensors: Mapping[str, Tensor], *, origin: str) -> None:
        """As `load_weights`, from tensors; `CheckpointError` when no name or some shape does not fit."""
        layers = weights.group(tensors, origin=origin)
        wanted = {lora.lora_name: lora for lora in self.loras}
        shared = wanted.keys() & layers.keys()
        if not shared:
            raise CheckpointError(
                f"{origin}: none of its {len(layers)} layers ({next(iter(layers), '')}, ...) is trained here"
            )
        for name in shared:
            layer = layers[name]
            wanted[name].load(down=layer.down, up=layer.up, alpha=layer.alpha)
        for text, names in (
            ("lacks %d layers of this network, which start fresh: %s", wanted.keys() - shared),
            ("has %d layers that this network does not train, left out: %s", layers.keys() - shared),
        ):
            if names:
                logger.warning("%s " + text, origin, len(names), ", ".join(sorted(names)[:5]))

    def export(self) -> dict[str, Tensor]:
        """The network as Kohya's tensors, by full key."""
        return {
            f"{lora.lora_name}.{leaf}": tensor
            for lora in self.loras
            for leaf, tensor in lora.export().items()
        }

    def save_weights(
        self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        """Write the network, cast to `dtype` (alpha too), with `metadata` and the `sshs_*` hashes."""
        weights.write(file, self.export(), dtype=dtype, metadata=metadata)

    def prepare_optimizer_params_with_multiple_te_lrs(
        self,
        text_encoder_lr: float | Sequence[float] | None,
        unet_lr: float | None,
        default_lr: float | None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups and their names. Groups whose rate is 0 or missing are left out.

        `text_encoder_lr` is one rate for both encoders or one each; None means `default_lr`, as for
        `unet_lr`.
        """
        self.requires_grad_(True)
        text_rates = _two_rates(text_encoder_lr, default_lr)
        rates = {CLIP_L: text_rates[0], T5: text_rates[1], UNET: default_lr if unet_lr is None else unet_lr}
        text_ratio = self.options.loraplus_text_encoder_lr_ratio or self.options.loraplus_lr_ratio
        unet_ratio = self.options.loraplus_unet_lr_ratio or self.options.loraplus_lr_ratio
        groups: list[dict[str, Any]] = []
        names: list[str] = []
        for prefix, component in _COMPONENTS:
            loras = [lora for lora in self.loras if lora.lora_name.startswith(f"{prefix}_")]
            ratio = unet_ratio if prefix == UNET else text_ratio
            for suffix, params, rate in self._component_groups(loras, rate=rates[prefix], ratio=ratio):
                if params and rate:
                    groups.append({"params": params, "lr": rate})
                    names.append(f"{component} {suffix}".strip())
        return groups, names

    def prepare_optimizer_params(
        self,
        text_encoder_lr: float | Sequence[float] | None,
        unet_lr: float | None,
        default_lr: float | None,
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """The same under the name that networks with one text encoder rate have."""
        return self.prepare_optimizer_params_with_multiple_te_lrs(text_encoder_lr, unet_lr, default_lr)

    def _component_groups(
        self, loras: Sequence[LoRALinear], *, rate: float | None, ratio: float | None
    ) -> Iterable[tuple[str, list[nn.Parameter], float | None]]:
        """(suffix of the name, parameters, rate): by regular expression, then the rest; plain, then LoRA+."""
        rules = self.options.network_reg_lrs
        sorted_loras: list[list[LoRALinear]] = [[] for _ in range(len(rules) + 1)]
        for lora in loras:
            hit = next(
                (i for i, (pattern, _) in enumerate(rules) if re.search(pattern, lora.lora_name)), len(rules)
            )
            sorted_loras[hit].append(lora)
        for i, members in enumerate(sorted_loras):
            own_rate = rules[i][1] if i < len(rules) else rate
            name = f"reg_lr_{i}" if i < len(rules) else ""
            named = [pair for lora in members for pair in lora.named_parameters()]
            plus = [p for key, p in named if ratio is not None and key.startswith("lora_up")]
            plain = [p for key, p in named if ratio is None or not key.startswith("lora_up")]
            yield name, plain, own_rate
            yield (
                f"{name} plus".strip(),
                plus,
                None if own_rate is None or ratio is None else own_rate * ratio,
            )

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: recomputing a block recomputes its adapters."""

    def prepare_grad_etc(self, text_encoder: object, unet: object) -> None:
        """Every adapter is trained."""
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: object, unet: object) -> None:
        """Dropouts on."""
        self.train()

    def on_step_start(self, text_encoder: object, unet: object) -> None:
        """Nothing to do."""

    def get_trainable_params(self) -> Iterable[nn.Parameter]:
        """The adapters' parameters."""
        return self.parameters()

    @torch.no_grad()
    def apply_max_norm_regularization(
        self, max_norm_value: float, device: torch.device | str | None
    ) -> tuple[int, float, float]:
        """Shrink adapters with a norm above `max_norm_value`; (how many, mean and largest norm after)."""
        results = [lora.limit_norm(max_norm_value) for lora in self.loras]
        shrunk = torch.stack([one for one, _ in results]).sum()
        norms = torch.stack([norm for _, norm in results])
        # One transfer for all layers.
        count, mean, largest = torch.stack([shrunk.float(), norms.mean(), norms.max()]).tolist()
        return int(count), mean, largest

    def update_grad_norms(self) -> None:
        """Take norms from the gradients of this step, for GGPO and for the log; nothing where neither is on."""
        for lora in self.loras:
            lora.update_perturbation()
        if self._reports_gradients:
            rows = [lora.gradient_row_norms() for lora in self.loras]
            self._gradient_norms = _stacked([norms.mean() for norms in rows if norms is not None])

    def update_norms(self) -> None:
        """Kohya's second hook of the same moment; `update_grad_norms` has refreshed all norms."""

    def grad_norms(self) -> Tensor | None:
        """Mean row norm of each layer's gradient [layers]; None when neither GGPO nor a log wants it."""
        if self._gradient_norms is not None:
            return self._gradient_norms
        return _stacked([p.gradient.mean() for p in self._perturbations()])

    def combined_weight_norms(self) -> Tensor | None:
        """Mean row norm of base weight and adapter of each layer [layers]; None when GGPO is off."""
        return _stacked([p.combined.mean() for p in self._perturbations()])

    def weight_norms(self) -> Tensor | None:
        """Norm of each layer's adapter [layers]; None when GGPO is off."""
        return _stacked([lora.delta_norm() for lora in self.loras if lora.perturbation is not None])

    def _perturbations(self) -> list[Perturbation]:
        return [lora.perturbation for lora in self.loras if lora.perturbation is not None]


def _stacked(norms: Sequence[Tensor]) -> Tensor | None:
    return torch.stack(list(norms)) if norms else None


def _two_rates(
    given: float | Sequence[float] | None, default: float | None
) -> tuple[float | None, float | None]:
    """Kohya's reading of text_encoder_lr: none -> the default, one -> both encoders, two -> (CLIP-L, T5)."""
    if given is None:
        return default, default
    if isinstance(given, int | float):
        return given, given
    if not given:
        return default, default
    return given[0], given[1] if len(given) > 1 else given[0]
