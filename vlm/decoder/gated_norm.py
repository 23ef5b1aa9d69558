"""The norm behind the scan, RMS(y silu(gate)) per group of channels, with a backward pass that makes everything again but its inputs.

Written as separate operations it keeps seven tensors of the size of y for the backward pass. Here some positions at a time pass through
memory that stays in cache, float32 inside whatever the dtype outside. The reference is transformers' NemotronHRMSNormGated.

Letters: T positions (of all rows together), F channels, G groups.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fresh_memory import fresh

__all__ = ["GatedNorm", "gated_norm"]

BLOCK_ELEMENTS = 262144
"""Positions times channels of one block: 1 MB of float32."""


def _blocks(y: Tensor) -> Iterator[slice]:
    rows = max(16, BLOCK_ELEMENTS // y.shape[1]) if y.device.type == "cpu" else max(1, len(y))
    for start in range(0, len(y), rows):
        yield slice(start, min(start + rows, len(y)))


def _normed(value: Tensor, groups: int, epsilon: float) -> tuple[Tensor, Tensor]:
    """value (T, F), changed in place -> the same as (T, G, F / G) with a mean square of 1 in each group, and the factors (T, G, 1)."""
    grouped = value.unflatten(1, (groups, -1))
    scale = torch.linalg.vector_norm(grouped, dim=-1, keepdim=True).square_().div_(grouped.shape[-1]).add_(epsilon).rsqrt_()
    return grouped.mul_(scale), scale


def gated_norm(y: Tensor, gate: Tensor, weight: Tensor, groups: int, epsilon: float) -> Tensor:
    """What `GatedNorm` computes, without a gradient: a decoding step's few rows in as few calls as there can be."""
    if y.numel() > BLOCK_ELEMENTS or not y.dtype == gate.dtype == weight.dtype or y.dtype not in (torch.float32, torch.float64):
        return GatedNorm.apply(y, gate, weight, groups, epsilon)
    value, _ = _normed(torch.nn.functional.silu(gate).mul_(y), groups, epsilon)
    return value.flatten(1).mul_(weight)


class GatedNorm(torch.autograd.Function):
    """apply(y, gate, weight, groups, epsilon) -> weight * n (T, F), n rounded to y's dtype; y and gate (T, F), weight (F,)."""

    @staticmethod
    def forward(ctx, y, gate, weight, groups, epsilon):
        ctx.save_for_backward(y, gate, weight)
        ctx.groups, ctx.epsilon = groups, epsilon
        dtype = torch.promote_types(y.dtype, torch.float32)
        result = fresh(y, *y.shape, dtype=torch.promote_types(y.dtype, weight.dtype))
        for rows in _blocks(y):
            value = torch.nn.functional.silu(gate[rows].to(dtype)).mul_(y[rows])
            _normed(value, groups, epsilon)
            torch.mul(weight, value.to(y.dtype), out=result[rows])
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_result):
        y, gate, weight = ctx.saved_tensors
        dtype = torch.promote_types(y.dtype, torch.float32)
        wide = weight.to(dtype)
        grad_y, grad_gate, grad_weight = fresh(y, *y.shape), fresh(gate, *gate.shape), torch.zeros_like(wide)
        for rows in _blocks(y):
            y_block, gate_block = y[rows].to(dtype), gate[rows].to(dtype)
            share = torch.sigmoid(gate_block)
            opened = gate_block * share  # silu(gate)
            value = y_block * opened
            grouped, scale = _normed(value, ctx.groups, ctx.epsilon)
            given = grad_result[rows].to(dtype)
            product = given * value
            grad_weight += product.sum(0)
            mean = product.mul_(wide).view(grouped.shape).mean(-1, keepdim=True)
            grad_value = torch.mul(given, wide, out=product)
            grad_value.view(grouped.shape).addcmul_(grouped, mean, value=-1.0).mul_(scale)
            grad_y[rows] = torch.mul(grad_value, opened, out=value)
            slope = torch.addcmul(share, share, opened, value=-1.0, out=value).add_(opened)  # silu'(g) = s + silu(g) (1 - s)
            grad_gate[rows] = grad_value.mul_(y_block).mul_(slope)
        return grad_y, grad_gate, grad_weight.to(weight.dtype), None, None
