"""FlashAttention 3 and 4, where the user has installed them, in the place of torch's own flash kernel.

torch lets a package take over the operator behind `scaled_dot_product_attention` for the whole process: layers,
compiled blocks and recorded steps stay as they are, and what the kernel does not take (a mask) goes to torch's
next kernel as ever. For FlashAttention 3 torch brings the code between the two. Its code for FlashAttention 4
reads two results (torch 2.11 to 2.13) where flash-attn-4 4.0.0b36 gives five. So that is written here, against
the two functions of the package that torch's code calls as well.

Whether the kernels are right on the card at hand is for the trial in `library.models.attention`.
"""

from __future__ import annotations

import importlib
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any

import torch
from torch import Tensor
from torch import library as operators
from torch.nn import attention as sdpa

from library.errors import EnvironmentUnsupported
from library.files.user_cache import cache_folder


@dataclass(frozen=True, slots=True)
class Package:
    """One package of kernels."""

    distribution: str
    install: str
    majors: tuple[int, ...]  # first numbers of the compute capabilities that have its forward and backward
    cards: str
    implementation: str  # its name in torch's list
    beneath: tuple[str, ...] = ()  # distributions whose version matters as much


_OURS = "polyrank-flash4"  # the code between torch and flash-attn-4 that is below
PACKAGES: Mapping[str, Package] = {
    "flash3": Package(
        "flash_attn_3", "build it from the folder hopper of the FlashAttention repository", (9,),
        "Hopper (H100, H200)", "FA3",
    ),
    "flash4": Package(
        "flash-attn-4", "pip install flash-attn-4", (9, 10, 11, 12), "Hopper or Blackwell", _OURS,
        beneath=("nvidia-cutlass-dsl", "nvidia-cutlass-dsl-libs-cu13"),
    ),
}  # fmt: skip
_KERNELS = "flash_attn.cute.interface"


def installed(name: str) -> str | None:
    """Versions of a package and of what it computes with, as one word; None where it is missing."""
    package = PACKAGES[name]
    version = _version(package.distribution)
    if version is None:
        return None
    return "_".join([name, version, *filter(None, map(_version, package.beneath))])


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def refusal(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Why a package cannot be tried here, as the rest of a sentence that begins with its name; None where it can."""
    package = PACKAGES[name]
    if device.type != "cuda" or torch.version.hip is not None:
        return "needs an NVIDIA GPU"
    if dtype == torch.float32:
        return "computes in bf16 and fp16 only, and mixed_precision is neither"
    if torch.cuda.get_device_capability(device)[0] not in package.majors:
        return f"needs a GPU of the kind {package.cards}, and this is {torch.cuda.get_device_name(device)}"
    if installed(name) is None:
        return f"needs the package {package.distribution}, which is not installed ({package.install})"
    return None


def usable(device: torch.device, dtype: torch.dtype) -> list[str]:
    """The packages that can be tried here."""
    return [name for name in PACKAGES if installed(name) and refusal(name, device, dtype) is None]


def activate(name: str) -> None:
    """Let a package's kernels be torch's flash kernel, for the whole process.

    Raises EnvironmentUnsupported where the package cannot be imported, or is without its kernels.
    """
    package = PACKAGES[name]
    if package.implementation == _OURS and _OURS not in sdpa.list_flash_attention_impls():
        _keep_compiled_kernels()
        sdpa.register_flash_attention_impl(package.implementation, register_fn=take_over)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*overridden")  # which is what is wanted
        try:
            sdpa.activate_flash_attention_impl(package.implementation)
        except (ImportError, RuntimeError) as error:  # torch says the latter of one without its kernels
            raise EnvironmentUnsupported(
                f"{package.distribution} cannot be imported ({error}): install it again, or remove it"
            ) from error


def _keep_compiled_kernels() -> None:
    """Kernels of flash-attn-4 are compiled when they are first called: keep them for the next process."""
    folder = cache_folder() / "flash4"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return  # each process compiles for itself
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))


class _Taken:
    """The operators taken over, for as long as torch holds it."""

    def __init__(self, held: operators.Library) -> None:
        self.held: operators.Library | None = held

    def remove(self) -> None:
        self.held = None


def take_over(key: str = "CUDA") -> _Taken:
    """Put flash-attn-4 behind torch's operators for tensors of one dispatch key. Raises ImportError."""
    importlib.import_module(_KERNELS)
    held = operators.Library("aten", "IMPL", key)  # type: ignore[no-untyped-call]
    held.impl("_scaled_dot_product_flash_attention", _forward)  # type: ignore[no-untyped-call]
    held.impl("_scaled_dot_product_flash_attention_backward", _backward)  # type: ignore[no-untyped-call]
    return _Taken(held)


def _forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    return_debug_mask: bool = False,
    *,
    scale: float | None = None,
) -> tuple[Any, ...]:
    """Output [B, H, L, D] in the strides of `query`, as compiled code expects, log-sum-exp, and what torch adds."""
    if dropout_p or return_debug_mask:
        raise NotImplementedError("FlashAttention 4 has no dropout: use attention = auto")
    out = torch.empty_like(query)
    _, logsumexp, *_ = importlib.import_module(_KERNELS)._flash_attn_fwd(
        *_by_token(query, key, value), softmax_scale=scale, causal=is_causal, return_lse=True,
        out=out.transpose(1, 2),
    )  # fmt: skip
    seed, offset = (torch.empty(shape, dtype=torch.uint64, device=query.device) for shape in ((2,), ()))
    debug_mask = query.new_empty(0)
    return out, logsumexp, None, None, query.shape[2], key.shape[2], seed, offset, debug_mask


def _backward(  # noqa: PLR0913 - torch's operator
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor | None,
    cum_seq_k: Tensor | None,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    philox_seed: Tensor,
    philox_offset: Tensor,
    *,
    scale: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients, each in the strides of what it belongs to."""
    grads = torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)
    dq, dk, dv = _by_token(*grads)
    importlib.import_module(_KERNELS)._flash_attn_bwd(
        *_by_token(query, key, value, out, grad_out), logsumexp, softmax_scale=scale, causal=is_causal,
        deterministic=torch.are_deterministic_algorithms_enabled(), dq=dq, dk=dk, dv=dv,
    )  # fmt: skip
    return grads


def _by_token(*tensors: Tensor) -> list[Tensor]:
    """[B, H, L, D] as [B, L, H, D], which the package reads."""
    return [tensor.transpose(1, 2) for tensor in tensors]
