"""Does it compute here what it should? Checks on the user's own model, device, dtype and installed kernels, by numbers.

A hybrid decoder fails silently: a kernel that ignores `seq_idx` lets packed samples see each other, padding decays a recurrent state, and
the loss still falls. Every such trap has a check here that compares two ways to the same result, one of them slow and obvious.

    python -m vlm.doctor [--model DIR] [--json]

Not here: speed (benchmarks/), and whether the model is any good (eval_vqa).
"""

from .check import Check
from .examination import examine

__all__ = ["Check", "examine"]
