"""What the operators of `library.models.norms` compute, in torch's words. Shape letters as there."""

from __future__ import annotations

import torch
from torch import Tensor


def enter(
    x: Tensor, gate: Tensor | None, branch: Tensor | None, shift: Tensor, scale: Tensor, epsilon: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The stream (without a branch x itself), y, and the stream's mean and 1 / deviation [B, L]."""
    stream = x
    if gate is not None and branch is not None:
        stream = _rounded(torch.addcmul(x.float(), gate.float(), branch.float()), x)
    normal, mean, size = torch.native_layer_norm(stream.float(), x.shape[-1:], None, None, epsilon)
    y = _rounded(torch.addcmul(shift.float(), 1 + scale.float(), normal), x)
    return stream, y, mean.squeeze(-1), size.squeeze(-1)


def enter_backward(  # noqa: PLR0913 (what one operator takes)
    grad_stream: Tensor,
    grad_y: Tensor,
    stream: Tensor,
    gate: Tensor | None,
    branch: Tensor | None,
    scale: Tensor,
    mean: Tensor,
    size: Tensor,
    with_sums: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Gradients of x and the branch; and of shift, scale and gate [B, 2 or 3, D] float32, empty unless asked for."""
    mean, size = mean[..., None], size[..., None]
    normal, wide = (stream.float() - mean) * size, grad_y.float()
    back = wide * (1 + scale.float())
    along = (back * normal).mean(dim=-1, keepdim=True)
    total = grad_stream.float() + size * (back - back.mean(dim=-1, keepdim=True) - normal * along)
    sums = [wide.sum(dim=1), (wide * normal).sum(dim=1)]
    grad_branch = None
    if gate is not None and branch is not None:
        sums.append((total * branch.float()).sum(dim=1))
        grad_branch = _rounded(total * gate.float(), branch)
    return _rounded(total, stream), grad_branch, torch.stack(sums, dim=1) if with_sums else mean.new_empty(0)


def leave_backward(grad: Tensor, gate: Tensor, branch: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient of the branch, and of its gate [B, 1, D] float32."""
    wide = grad.float()
    sums = (wide * branch.float()).sum(dim=1, keepdim=True)
    return _rounded(wide * gate.float(), branch), sums


def _rounded(wide: Tensor, like: Tensor) -> Tensor:
    """`wide` float32 in the dtype of `like`, its rows one after the other as kernels write them."""
    return wide.to(like.dtype).contiguous()
