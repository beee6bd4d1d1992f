"""LyCORIS's LoHa and LoKr on a Linear layer as products of small matrices, and not of one as large as the weight.

LyCORIS builds the whole difference [out, in] for each use, and its backward pass the difference's whole gradient. The
same function and the same gradients, from the module's own parameters:

    LoHa    (a1 b1) * (a2 b2)       is of rank r^2: each pair of ranks (i, j) is the column a1_i * a2_j of `up` and
                                    the row b1_i * b2_j of `down`
    LoKr    w1 (x) (a2 b2)          is of rank f r, with f the shorter side of w1: (w1 (x) a2) (I (x) b2)
            (a1 b1) (x) (a2 b2)     is of rank r^2: (a1 (x) a2) (b1 (x) b2)
            w1 (x) w2               takes the input as f_i groups: w2 is applied to each, w1 mixes them

A low rank goes along with the layer's own product where that takes it (`low_rank`, as in `networks.layers`). Factors
are made in float32 and rounded once, to the dtype that the product is computed in.

Shape letters: T tokens, r rank, R rank of the low-rank product; w1 is [f_o, f_i] and w2 [p, q], so that the layer is
[out, in] = [f_o p, f_i q].
"""

from __future__ import annotations

import inspect
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Of a layer's shorter side: up to this share a product of rank R waits for memory and not for arithmetic, on the GPUs
# that FLUX is trained on. Beyond it groups are cheaper.
_LOW = 1 / 8
# Groups up to so many are mixed by a compiler's one pass; matrices of that size leave a GPU idle.
_FEW_GROUPS = 8


def install(module: Any) -> None:
    """Let a LyCORIS module compute so where it can, before it is applied; its class and parameters stay.

    It cannot with dropouts or DoRA, nor on layers that are no plain Linear; and the library's way stays for ranks with
    which the whole difference is as cheap.
    """
    layer, kind = module.org_module[0], type(module).__name__
    if kind not in ("LohaModule", "LokrModule") or type(layer) is not nn.Linear or module.wd:
        return
    if module.dropout or module.rank_dropout or module.module_dropout:
        return
    if kind == "LohaModule" and 2 * module.lora_dim**2 * sum(module.shape) > layer.weight.numel():
        return
    module.__dict__["apply_to"] = MethodType(_apply_to, module)
    module.__dict__["forward"] = MethodType(_forward, module)


def _apply_to(self: Any, **options: Any) -> None:
    """The library's, and whether the layer's product takes another along: found out here, where nothing is compiled."""
    type(self).apply_to(self, **options)
    self.base_joins = "low_rank" in inspect.signature(self.org_forward).parameters


def _forward(self: Any, x: Tensor) -> Tensor:
    """[..., in] to [..., out], in the dtype of the layer's own output."""
    if self.multiplier == 0 and not torch.is_grad_enabled():
        unchanged: Tensor = self.org_forward(x)
        return unchanged
    strength = self.scalar.float() * (self.scale * self.multiplier)  # scalar
    low_rank = _loha_factors(self) if type(self).__name__ == "LohaModule" else _lokr_factors(self)
    if low_rank is not None:
        down, up = low_rank[0], low_rank[1] * strength
        if self.base_joins:
            joined: Tensor = self.org_forward(x, low_rank=(down, up))
            return joined
    base: Tensor = self.org_forward(x)
    x = x.to(_computed_in(x))
    if low_rank is not None:
        added = F.linear(F.linear(x, down.to(x.dtype)), up.to(x.dtype))
    else:
        added = _in_groups(self, x, strength)
    return base + added.to(base.dtype)


def _computed_in(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _loha_factors(module: Any) -> tuple[Tensor, Tensor]:
    """`down` [r^2, in] and `up` [out, r^2], float32."""
    first, second = module.hada_w1_b.float(), module.hada_w2_b.float()
    down = (first[:, None] * second[None]).flatten(0, 1)
    first, second = module.hada_w1_a.float(), module.hada_w2_a.float()
    return down, (first[:, :, None] * second[:, None]).flatten(1)


def _lokr_factors(module: Any) -> tuple[Tensor, Tensor] | None:
    """`down` [R, in] and `up` [out, R], float32; None where w2 is no product, or R not low."""
    if module.use_w2:
        return None
    wide, narrow = module.lokr_w2_a, module.lokr_w2_b  # [p, r] and [r, q]
    first = (module.lokr_w1,) if module.use_w1 else (module.lokr_w1_a, module.lokr_w1_b)
    groups = min(first[0].shape) if module.use_w1 else first[0].shape[1]
    if groups * narrow.shape[0] > _LOW * min(module.shape):
        return None
    left, right = first[0].float(), first[-1].float()
    if module.use_w1:  # w1 stands on its longer side, beside the identity
        same = torch.eye(groups, device=left.device)
        left, right = (left, same) if left.shape[1] == groups else (same, right)
    return torch.kron(right, narrow.float()), torch.kron(left, wide.float())


def _in_groups(module: Any, x: Tensor, strength: Tensor) -> Tensor:  # [..., in] -> [..., out]
    """The product of a LoKr taken apart: w1 mixes groups where that is cheapest."""
    if module.use_w1:
        w1 = module.lokr_w1.float()
    else:  # summed up by hand: autocast would round a product of matrices
        w1 = (module.lokr_w1_a.float()[:, :, None] * module.lokr_w1_b.float()).sum(1)
    w1 = w1 * strength
    out_groups, in_groups = w1.shape
    groups = x.reshape(-1, in_groups, x.shape[-1] // in_groups)  # [T, f_i, q]
    if not module.use_w2:
        wide, narrow = module.lokr_w2_a.to(x.dtype), module.lokr_w2_b.to(x.dtype)
        mixed = F.linear(_mix(w1, F.linear(groups, narrow)), wide)
    else:
        w2 = module.lokr_w2.to(x.dtype)
        rows, columns = w2.shape
        before = out_groups * columns * (in_groups + rows)  # multiplications for a token
        after = in_groups * rows * (columns + out_groups)
        mixed = F.linear(_mix(w1, groups), w2) if before <= after else _mix(w1, F.linear(groups, w2))
    return mixed.reshape(*x.shape[:-1], -1)


def _mix(w1: Tensor, groups: Tensor) -> Tensor:  # [f_o, f_i] float32, [T, f_i, n] -> [T, f_o, n]
    if max(w1.shape) > _FEW_GROUPS or not torch.compiler.is_compiling():
        return torch.matmul(w1.to(groups.dtype), groups)
    first, *others = (w1[:, i, None] * groups[:, i, None] for i in range(w1.shape[1]))
    return sum(others, first).to(groups.dtype)
