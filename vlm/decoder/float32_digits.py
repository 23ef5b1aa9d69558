"""Products and convolutions with all of float32's digits, where something is held to them: a GPU may be set to TF32, which has ten bits."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["float32_digits"]


@contextmanager
def float32_digits() -> Iterator[None]:
    """Within the block no TF32, which cuDNN's convolutions use unless told otherwise; afterwards everything as it was."""
    precision, convolutions = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(precision)
        torch.backends.cudnn.allow_tf32 = convolutions
