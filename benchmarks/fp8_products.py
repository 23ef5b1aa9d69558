"""BF16 on a processor without BF16 units: part of fp8.py.

Such a processor multiplies BF16 matrices some ten times more slowly than float32 ones. The units of a GPU take BF16 factors, add up in
float32 and round the result; multiplying the same BF16 values as float32 and rounding the result is that, at float32's speed, in the
forward pass and, because the casts are differentiated, in the backward pass.
"""

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

__all__ = ["Float32Products"]

PRODUCTS = {F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul}


class Float32Products(TorchFunctionMode):
    """Within `with Float32Products():` products of BF16 tensors are made in float32 and rounded to BF16."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func in PRODUCTS and args[0].dtype == torch.bfloat16:
            args = [value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value for value in args]
            kwargs = {name: value.float() if isinstance(value, torch.Tensor) and value.is_floating_point() else value
                      for name, value in kwargs.items()}  # fmt: skip
            return func(*args, **kwargs).bfloat16()
        return func(*args, **kwargs)
