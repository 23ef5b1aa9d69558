"""The decoder's norm, x / RMS(x) weighted, with a backward pass that makes everything again but its input.

Written as separate operations it keeps two tensors of the size of x for the backward pass, in float32, and goes over such tensors some
fifteen times. Here some positions at a time stay in cache. It computes in float32 whatever the dtype outside, and gives back the dtype it
was given (Zhang and Sennrich 2019, arXiv 1910.07467, eq. 4). The reference is transformers' NemotronHRMSNorm, which stays in use where no
gradient is asked for.

Letters: T positions (of all rows together), D channels.
"""

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHRMSNorm

from .fresh_memory import fresh

__all__ = ["HybridNorm", "RMSNorm"]

BLOCK_ELEMENTS = 262144
"""Positions times channels of one block: 1 MB of float32."""


class HybridNorm(NemotronHRMSNorm):
    """Made from a stock norm by `HybridNorm.take_over(norm)`.

    rests: {"weight": (D,) float32}, what the dtype of the weight leaves of it, to be added (train_vlm/float32_rests.py).
    """

    rests: Mapping[str, Tensor] = MappingProxyType({})

    @classmethod
    def take_over(cls, norm: NemotronHRMSNorm) -> None:
        norm.__class__ = cls

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., D) -> the same, in its dtype."""
        weight, rest = self.weight, self.rests.get("weight")
        if rest is None and not torch.is_grad_enabled() and hidden_states.dtype != torch.float64:  # which stock norms narrow
            # Some releases give back the weight's dtype.
            return super().forward(hidden_states.to(weight.dtype)).to(hidden_states.dtype)
        return RMSNorm.apply(hidden_states, weight if rest is None else weight.to(rest.dtype) + rest, self.variance_epsilon)


def _blocks(x: Tensor) -> Iterator[slice]:
    rows = max(16, BLOCK_ELEMENTS // x.shape[1]) if x.device.type == "cpu" else max(1, len(x))
    for start in range(0, len(x), rows):
        yield slice(start, min(start + rows, len(x)))


class RMSNorm(torch.autograd.Function):
    """apply(x, weight, epsilon) -> weight * x / sqrt(mean(x^2) + epsilon), of x's shape and dtype; x (..., D), weight (D,)."""

    @staticmethod
    def forward(ctx, x, weight, epsilon):
        dtype = torch.promote_types(x.dtype, torch.float32)
        flat, wide = x.reshape(-1, x.shape[-1]), weight.to(dtype)
        result, scale = fresh(flat, *flat.shape), flat.new_empty(len(flat), 1, dtype=dtype)
        for rows in _blocks(flat):
            value = flat[rows].to(dtype)
            norm = torch.linalg.vector_norm(value, dim=-1, keepdim=True)
            torch.rsqrt(norm.square_().div_(value.shape[-1]).add_(epsilon), out=scale[rows])
            if result.dtype == dtype:
                torch.mul(value, scale[rows], out=result[rows]).mul_(wide)
            else:
                result[rows] = (value * scale[rows]).mul_(wide)
        ctx.save_for_backward(x, weight, scale)
        return result.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_result):
        x, weight, scale = ctx.saved_tensors
        dtype, wide = scale.dtype, weight.to(scale.dtype)
        flat, given = x.reshape(-1, x.shape[-1]), grad_result.reshape(-1, x.shape[-1])
        grad_x, grad_weight = fresh(flat, *flat.shape), torch.zeros_like(wide)
        for rows in _blocks(flat):
            normed = flat[rows].to(dtype) * scale[rows]
            product = given[rows].to(dtype) * normed
            if ctx.needs_input_grad[1]:
                grad_weight += product.sum(0)
            mean = product.mul_(wide).mean(-1, keepdim=True)  # not by a matrix product, whose last bits depend on where rows lie
            grad_value = torch.mul(given[rows], wide, out=product).addcmul_(normed, mean, value=-1.0)
            if grad_x.dtype == dtype:
                torch.mul(grad_value, scale[rows], out=grad_x[rows])
            else:
                grad_x[rows] = grad_value.mul_(scale[rows])
        return grad_x.view(x.shape), grad_weight.to(weight.dtype) if ctx.needs_input_grad[1] else None, None
