"""One linear layer whose three products of a training step (output, gradient of the input, gradient of the weights) run in FP8.

torchao's Float8Linear casts and multiplies: per-tensor scales of this very tensor, E4M3 forward, E5M2 for gradients. Three things come on
top. A GPU's FP8 product wants multiples of 16, also where tokens are summed over (the gradient of the weights), and a pack has any number
of tokens: rows of zeros are added inside, which no scale can see. A layer can go back to its own precision without a new module or
parameter, because an engine (ZeRO) holds on to both. And someone may listen (`meter`) to what FP8 costs this layer.

Imported only by fp8.py, when FP8 is asked for: torchao is an optional package.

Letters: T rows (tokens), K inputs, N outputs.
"""

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torchao.float8.float8_linear import Float8Linear, matmul_with_hp_or_float8_args

__all__ = ["MULTIPLE", "Fp8Linear"]

MULTIPLE = 16
"""What every size of an FP8 product on a GPU is a multiple of."""


@cache
def _compiled_product() -> Callable:
    """torchao's products as one compiled function for all layers: sizes are dynamic, and no module is an argument."""
    return torch.compile(matmul_with_hp_or_float8_args.apply, dynamic=True)


class Fp8Linear(Float8Linear):
    """Made from torchao's Float8Linear by `take_over`; its parameters stay the same objects.

    uses_fp8: False puts the layer back to its own precision, at once and without a trace in the state dict. meter: None, or called in the
    forward pass as meter(layer, rows (T, K), output (T, N)), the output without bias; what it returns is the output.
    """

    uses_fp8: bool = True
    compiled: bool = False
    meter: Callable[["Fp8Linear", Tensor, Tensor], Tensor] | None = None

    @classmethod
    def take_over(cls, layer: Float8Linear, *, compiled: bool = False) -> None:
        layer.__class__ = cls
        layer.compiled = compiled

    def product(self, rows: Tensor, weight: Tensor) -> Tensor:
        """rows (T, K) x weight (N, K) -> (T, N) in the dtype of `rows`; T is any number above 0. Both gradients are made in FP8 too."""
        missing = -len(rows) % MULTIPLE
        padded = F.pad(rows, (0, 0, 0, missing)) if missing else rows
        multiply = _compiled_product() if self.compiled else matmul_with_hp_or_float8_args.apply
        output = multiply(padded, weight.t(), self.linear_mm_config, self.config)
        return output[: len(rows)] if missing else output

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        if not self.uses_fp8:
            return F.linear(input, self.weight, self.bias)
        rows = input.reshape(-1, self.in_features)  # T K
        output = self.product(rows, self.weight)  # T N
        if self.meter is not None:
            output = self.meter(self, rows, output)
        if self.bias is not None:
            output = output + self.bias.to(output.dtype)
        return output.reshape(*input.shape[:-1], self.out_features)
