"""Orthogonal finetuning for FLUX.1 under Kohya's module name and keys: `network_module = networks.oft_flux`.

Each Linear's output rows are cut into `network_dim` blocks, and each block's rows are turned by a rotation of its own:

    W' = R^T W,  R = (I + Q)(I - Q)^-1,  Q skew-symmetric, its norm at most network_alpha times the rows

(Qiu et al. 2023, "Controlling Text-to-Image Diffusion by Orthogonal Finetuning"; the Cayley form and Kohya's
constraint.) The turn is applied to the layer's output rather than to its weight, so weights of any storage will do.

network_args: `enable_all_linear=True` takes every Linear of the blocks, else the attention of the double blocks.
ComfyUI does not load these files; lycoris.kohya with algo=diag-oft trains the same kind of network under keys it loads.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from library.errors import CheckpointError, NetworkPluginError
from networks import weights
from networks.options import parse_bool
from networks.targets import Candidate, candidates, split_rows

logger = logging.getLogger(__name__)

PREFIX = "oft_unet"
DEFAULT_BLOCKS = 4
DEFAULT_CONSTRAINT = 1e-3
_EPSILON = 1e-8
_ATTENTION = ("_attn.qkv", "_attn.proj")
_ARGUMENTS = frozenset({"enable_all_linear", "dropout"})  # the trainer adds dropout for every module


def create_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: object,
    text_encoder: object,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: object,
) -> OFTNetwork:
    """A fresh network on `unet`: `network_dim` blocks a layer, `network_alpha` the constraint. No text encoder."""
    del vae, text_encoder, neuron_dropout
    check_arguments(kwargs)
    logger.warning(
        "files of networks.oft_flux are loaded by Kohya's tools only; lycoris.kohya with algo=diag-oft trains the same "
        "kind of network under keys that ComfyUI loads"
    )
    constraint = DEFAULT_CONSTRAINT if network_alpha is None else float(network_alpha)
    if constraint >= 1:
        logger.warning(
            "network_alpha = %g is the bound on OFT's rotations and leaves them free; 1e-3 is usual",
            constraint,
        )
    return OFTNetwork(
        _targets(unet, all_linear=parse_bool("enable_all_linear", kwargs.get("enable_all_linear", False))),
        blocks=int(network_dim or DEFAULT_BLOCKS),
        constraint=constraint,
        multiplier=float(multiplier),
    )


def check_arguments(arguments: Mapping[str, object]) -> None:
    """Raise `NetworkPluginError` for network_args that this module does not know."""
    unknown = sorted(arguments.keys() - _ARGUMENTS)
    if unknown:
        raise NetworkPluginError(f"network_args {unknown[0]}: networks.oft_flux knows enable_all_linear only")
    parse_bool("enable_all_linear", arguments.get("enable_all_linear", False))


def create_network_from_weights(
    multiplier: float,
    file: str | Path | None,
    vae: object,
    text_encoder: object,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: object,
) -> tuple[OFTNetwork, dict[str, Tensor]]:
    """A network of the layers, blocks and constraint that a file (or `weights_sd`) has, loaded with its numbers."""
    del vae, text_encoder, for_inference, kwargs
    tensors = dict(weights_sd) if weights_sd is not None else weights.read(str(file))
    names = {key.split(".")[0] for key in tensors}
    found = [candidate for candidate in _targets(unet, all_linear=True) if _name(candidate) in names]
    blocks = next((t.shape[0] for key, t in tensors.items() if ".oft_blocks." in key), None)
    if not found or blocks is None:
        raise CheckpointError(f"{file or 'weights'} holds no OFT network for this model (keys {PREFIX}_...)")
    alphas = (float(tensor) for key, tensor in tensors.items() if key.endswith(".alpha"))
    network = OFTNetwork(
        found, blocks=blocks, constraint=next(alphas, DEFAULT_CONSTRAINT), multiplier=float(multiplier)
    )
    network.load_tensors(tensors, origin=str(file or "weights"))
    return network, tensors


def _targets(transformer: nn.Module, *, all_linear: bool) -> list[Candidate]:
    found = (c for c in candidates(transformer, (), t5=False) if c.input_layer is None)
    return [c for c in found if all_linear or c.path.endswith(_ATTENTION)]


def _name(candidate: Candidate) -> str:
    return f"{PREFIX}_{candidate.path}".replace(".", "_")


class OFTLinear(nn.Module):
    """The rotations of one layer: `oft_blocks`, one [blocks, n, n] for each part of a fused projection, and `alpha`."""

    alpha: Tensor  # scalar, float32: the constraint

    def __init__(self, candidate: Candidate, *, blocks: int, constraint: float, multiplier: float) -> None:
        super().__init__()
        self.oft_name = _name(candidate)
        self.parts = split_rows(candidate) or (candidate.linear.out_features,)
        self.multiplier = multiplier
        for rows in self.parts:
            if rows % blocks:
                raise NetworkPluginError(
                    f"network_dim = {blocks} is the number of OFT's blocks and must divide the {rows} rows of "
                    f"{candidate.path}"
                )
        sizes = [rows // blocks for rows in self.parts]
        self.oft_blocks = nn.ParameterList(torch.zeros(blocks, size, size) for size in sizes)
        self.register_buffer("alpha", torch.tensor(constraint, dtype=torch.float32))
        # In a tuple, so that the base layer is not registered as part of the adapter.
        self._linear = (candidate.linear,)
        self._base_forward: Callable[[Tensor], Tensor] | None = None

    @property
    def linear(self) -> nn.Linear:
        """The adapted layer."""
        return self._linear[0]

    def apply_to(self) -> None:
        """Take over the layer's `forward`."""
        assert self._base_forward is None, f"{self.oft_name} is applied already"
        self._base_forward = self.linear.forward
        self.linear.forward = self.forward  # type: ignore[method-assign, assignment]

    def turns(self) -> list[Tensor]:
        """multiplier * (R - I) of each part, [blocks, n, n] float32."""
        return [
            self.multiplier * _rotation_less_identity(blocks.float(), self.alpha * rows)
            for blocks, rows in zip(self.oft_blocks, self.parts, strict=True)
        ]

    def forward(self, x: Tensor) -> Tensor:  # [..., in] -> [..., out]
        """The layer's output, turned: W x + (R - I)^T W x + bias, in the dtype of the layer's own output."""
        assert self._base_forward is not None, f"{self.oft_name} is not applied"
        base = self._base_forward(x)
        if self.multiplier == 0:
            return base
        product = base if self.linear.bias is None else base - self.linear.bias.to(base.dtype)
        changes = [
            _turned(part, turn)
            for part, turn in zip(torch.split(product, list(self.parts), dim=-1), self.turns(), strict=True)
        ]
        return base + torch.cat(changes, dim=-1).to(base.dtype)

    @torch.no_grad()
    def merge(self) -> None:
        """Turn the layer's weight itself, in float32, rounded to its own dtype."""
        weight = self.linear.weight
        rows = torch.split(weight.float().T, list(self.parts), dim=-1)
        changes = [
            _turned(part, turn.to(weight.device)) for part, turn in zip(rows, self.turns(), strict=True)
        ]
        weight.copy_((weight.float() + torch.cat(changes, dim=-1).T).to(weight.dtype))


def _rotation_less_identity(blocks: Tensor, limit: Tensor) -> Tensor:
    """(I + Q)(I - Q)^-1 - I of Q = blocks - blocks^T, its norm over all blocks brought down to `limit`."""
    skew = blocks - blocks.transpose(1, 2)
    norm = torch.linalg.vector_norm(skew)
    skew = skew * ((torch.minimum(norm, limit) + _EPSILON) / (norm + _EPSILON))
    identity = torch.eye(skew.shape[-1], device=skew.device)
    # (I + Q)(I - Q)^-1 - I = 2 Q (I - Q)^-1, which loses nothing while Q is small; the factors commute.
    less: Tensor = torch.linalg.solve(identity - skew, 2 * skew)
    return less


def _turned(product: Tensor, turn: Tensor) -> Tensor:
    """Each block of the last axis of `product` [..., blocks * n] times its matrix `turn` [blocks, n, n]."""
    apart = rearrange(product, "... (k n) -> ... k n", k=turn.shape[0])
    turned = torch.einsum("...kn,knp->...kp", apart, turn.to(product.dtype))
    return rearrange(turned, "... k n -> ... (k n)")


class OFTNetwork(nn.Module):
    """The rotations of one run, registered under their file names once applied."""

    train_t5xxl = False

    def __init__(
        self, targets: Sequence[Candidate], *, blocks: int, constraint: float, multiplier: float
    ) -> None:
        super().__init__()
        self.multiplier = multiplier
        self.unet_ofts = [
            OFTLinear(target, blocks=blocks, constraint=constraint, multiplier=multiplier)
            for target in targets
        ]

    def apply_to(
        self, text_encoders: object, unet: nn.Module, apply_text_encoder: bool = True, apply_unet: bool = True
    ) -> None:
        """Put the rotations in effect. There is nothing for text encoders."""
        del text_encoders, unet, apply_text_encoder
        self.unet_ofts = self.unet_ofts if apply_unet else []
        for oft in self.unet_ofts:
            oft.apply_to()
            self.add_module(oft.oft_name, oft)

    def set_multiplier(self, multiplier: float) -> None:
        """Scale how far every rotation is from the identity; 0 gives the base model."""
        self.multiplier = multiplier
        for oft in self.unet_ofts:
            oft.multiplier = multiplier

    def is_mergeable(self) -> bool:
        """Rotations can be multiplied into the weights."""
        return True

    @torch.no_grad()
    def merge_to(
        self,
        text_encoders: object,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        """Turn the base weights themselves, after loading `weights_sd` if given."""
        del text_encoders, unet, dtype, device
        if weights_sd is not None:
            self.load_tensors(weights_sd, origin="weights")
        for oft in self.unet_ofts:
            oft.merge()

    def load_weights(self, file: str | Path) -> None:
        """Load a file into the layers there are."""
        self.load_tensors(weights.read(file), origin=str(file))

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor], *, origin: str) -> None:
        """As `load_weights`, from tensors. Raises `CheckpointError` when one is missing or of another shape."""
        for oft in self.unet_ofts:
            own = {
                f"{oft.oft_name}.{leaf}": tensor for leaf, tensor in oft.state_dict(keep_vars=True).items()
            }
            for key, tensor in own.items():
                if key not in tensors or tensors[key].shape != tensor.shape:
                    found = tuple(tensors[key].shape) if key in tensors else "nothing"
                    raise CheckpointError(
                        f"{origin}: {key} should be {tuple(tensor.shape)} and is {found}; give the file's number of "
                        "blocks as network_dim and its enable_all_linear, or dim_from_weights"
                    )
                tensor.copy_(tensors[key])

    def save_weights(
        self, file: str | Path, dtype: torch.dtype | None, metadata: Mapping[str, str] | None
    ) -> None:
        """Write the network under Kohya's keys, cast to `dtype`, with `metadata` and the `sshs_*` hashes."""
        tensors = {f"{o.oft_name}.{leaf}": t for o in self.unet_ofts for leaf, t in o.state_dict().items()}
        weights.write(file, tensors, dtype=dtype, metadata=metadata)

    def prepare_optimizer_params(
        self, text_encoder_lr: object, unet_lr: float | None, default_lr: float | None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """One group, "unet"."""
        del text_encoder_lr
        self.requires_grad_(True)
        rate = default_lr if unet_lr is None else unet_lr
        return [{"params": list(self.parameters()), "lr": rate}], ["unet"]

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: recomputing a block recomputes its rotations."""

    def prepare_grad_etc(self, text_encoder: object, unet: object) -> None:
        """Every rotation is trained."""
        self.requires_grad_(True)

    def on_epoch_start(self, text_encoder: object, unet: object) -> None:
        """Training mode."""
        self.train()

    def on_step_start(self, text_encoder: object, unet: object) -> None:
        """Nothing to do."""

    def get_trainable_params(self) -> Iterable[nn.Parameter]:
        """The rotations' parameters."""
        return self.parameters()
