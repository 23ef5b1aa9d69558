"""A fault to plant in a model: forwards all is well, backwards nothing is finite."""

import torch


class Poison(torch.autograd.Function):
    """apply(value, factor) passes the value on, and its gradient times `factor` (inf or nan) back."""

    @staticmethod
    def forward(ctx, value, factor):
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.factor, None
