"""A_log, D, dt_bias and norms in float32 under ZeRO-3, which lays everything that trains into one buffer of one dtype.

There each of them is a bfloat16 parameter and a float32 copy in the optimizer; the forward pass would see the first. What bfloat16 leaves
of the copy, the rest, is a few numbers a layer: every rank keeps it whole beside the parameter, the mixer (vlm/decoder/mixer.py) or the
norm (vlm/decoder/norm.py) adds it back, and it is read anew after each update. The copies themselves begin from the values before the cast.
"""

import torch
from torch import nn

from train_vlm.kept_precision import KEPT

__all__ = ["Float32Rests"]

# By their names below a module that has `rests`: a mixer, whose gated norm is computed by the mixer itself, or a norm.
RESTS = (*KEPT, "norm.weight", "weight")


class Float32Rests:
    """Made of a model before its engine starts, `attach`ed to the engine afterwards. All ranks do everything together."""

    def __init__(self, model: nn.Module):
        self.entries = [
            (f"{name}.{short}", owner, short, parameter.detach().float().clone())
            for name, owner in model.named_modules()
            if hasattr(owner, "rests")
            for short, parameter in owner.named_parameters()
            if short in RESTS
        ]
        self.engine, self.seen_steps = None, None

    def attach(self, engine) -> None:
        """Give the optimizer's copies the values from before the cast, and their owners the rests; from now on before each pass."""
        from deepspeed.utils import safe_set_local_fp32_param

        self.engine = engine
        # Beside the engine's parameters: what is read after each update would else go over the bus twice.
        self.entries = [(name, owner, short, value.to(engine.device)) for name, owner, short, value in self.entries]
        for _, owner, short, value in self.entries:
            parameter = owner.get_parameter(short)
            if parameter.requires_grad:
                size = parameter.ds_tensor.numel()  # the last rank's piece is padded
                start = size * torch.distributed.get_rank()
                piece = torch.zeros(size, device=value.device)
                own = value.flatten()[start : start + size]
                piece[: len(own)] = own
                safe_set_local_fp32_param(parameter, piece)
        self.refresh()
        engine.module.register_forward_pre_hook(lambda *_: self._refresh_when_due())

    def whole(self) -> dict[str, torch.Tensor]:
        """{parameter's name: its float32 value}; of what does not train, the value it came with."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {}
        for name, owner, short, value in self.entries:
            parameter = owner.get_parameter(short)
            copy = safe_get_full_fp32_param(parameter) if parameter.requires_grad else None
            found[name] = value if copy is None else copy.detach().float().reshape(value.shape).to(value.device)
        return found

    def refresh(self) -> None:
        """Read the optimizer's copies and set what bfloat16 leaves of them."""
        self.seen_steps, values = self.engine.global_steps, self.whole()
        for name, owner, short, _ in self.entries:
            parameter = owner.get_parameter(short)
            value = values[name]
            owner.rests = {**owner.rests, short: value - value.to(parameter.dtype).float()}

    def _refresh_when_due(self) -> None:
        if self.engine.global_steps != self.seen_steps:  # after an update, and after a checkpoint was loaded
            self.refresh()
