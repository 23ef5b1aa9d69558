"""A_log, D, dt_bias and the decoder's norms in float32 while all else trains in bfloat16.

DeepSpeed casts every parameter when its engine starts. Its optimizer has float32 copies, but each forward pass would see rounded ones:
dt = softplus(dt_bias + ...) and A = -exp(A_log) are the decay of the recurrent state, and what 8 bits leave of them was measured
(docs/zero.md). A norm's weights lie near 1, where a step of bfloat16 is larger than many updates; norms compute in float32 and give back
the dtype of what they are given, so that nothing behind them widens. The cast asks the model for its parameters; while it runs, these are
not among them. They have parameter groups of their own (freezing.py: one dtype a group), which ZeRO lays out, reduces and steps like the
others.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer, NemotronHRMSNorm

__all__ = ["KEPT", "kept_in_float32", "kept_parameters", "widen_kept"]

KEPT = ("A_log", "D", "dt_bias")


def kept_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """{name: parameter} of A_log, D, dt_bias and the weights of the decoder's norms."""
    # The norm within a Mamba-2 mixer is of a class that has another name in each release of transformers.
    mixers = [module for module in model.modules() if isinstance(module, NemotronHMamba2Mixer)]
    norms = {id(module.weight) for module in model.modules() if isinstance(module, NemotronHRMSNorm)} | {id(m.norm.weight) for m in mixers}
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in KEPT or id(p) in norms}


def widen_kept(model: nn.Module) -> None:
    """Make A_log, D, dt_bias and the decoder's norms float32, before parameter groups are made of them."""
    for parameter in kept_parameters(model).values():
        if parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


@contextmanager
def kept_in_float32(model: nn.Module) -> Iterator[None]:
    """Start DeepSpeed's engine around `model` within the block. Raises RuntimeError when they were cast all the same."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    cast, kept = DeepSpeedEngine._cast_module_mixed_precision, {id(parameter) for parameter in kept_parameters(model).values()}

    def cast_others(engine, *arguments, **settings) -> None:
        every = list(engine.module.parameters())
        engine.module.parameters = lambda recurse=True: iter([p for p in every if id(p) not in kept])
        try:
            cast(engine, *arguments, **settings)
        finally:
            del engine.module.parameters

    DeepSpeedEngine._cast_module_mixed_precision = cast_others
    try:
        yield
    finally:
        DeepSpeedEngine._cast_module_mixed_precision = cast
    narrow = [name for name, parameter in kept_parameters(model).items() if parameter.dtype != torch.float32]
    if narrow:
        raise RuntimeError(
            f"{narrow[0]} and {len(narrow) - 1} others are not float32 in the engine; expected {', '.join(KEPT)} and norms to stay so"
        )
