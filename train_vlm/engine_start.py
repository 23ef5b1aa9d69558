"""Start DeepSpeed's engine around a model: what has to be said to it beyond its dictionary of settings.

Under ZeRO-3 the model is shared out without putting all of it on every card. The engine is told to leave A_log, D, dt_bias and the
decoder's norms in float32 (kept_precision.py; under ZeRO-3 float32_rests.py), to print nothing, and, on a single rank without ZeRO, to keep
its hands off the gradients: it would copy all of them into one buffer to send them to nobody.
"""

import contextlib
import io

import torch
from torch import nn

from train_vlm.float32_rests import Float32Rests
from train_vlm.kept_precision import kept_in_float32
from train_vlm.recipe import Recipe

__all__ = ["keeps_float32", "start_engine"]


def keeps_float32(recipe: Recipe) -> bool:
    """Whether A_log, D, dt_bias and norms are float32 parameters. ZeRO-3 lays everything that trains into one buffer of one dtype."""
    return recipe.run.precision == "bfloat16" and recipe.run.zero_stage < 3


def _share_out(model: nn.Module, settings: dict, dtype: torch.dtype, device: torch.device) -> None:
    """Lay the parameters out over the ranks, one after the other. The engine would first put the whole model on every card, where ZeRO-3
    leaves a share of it: 94 GB of 47 billion parameters."""
    import deepspeed

    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for buffer in model.buffers():
        buffer.data = buffer.data.to(device)
    deepspeed.zero.Init(module=model, config_dict_or_path=settings, dtype=dtype)


def start_engine(model: nn.Module, optimizer, recipe: Recipe, settings: dict, ranks: int):
    """(engine, DeepSpeed's optimizer); `settings`: of `recipe.deepspeed_config`. Every rank calls it."""
    import deepspeed

    keeping = kept_in_float32(model) if keeps_float32(recipe) else contextlib.nullcontext()
    rests = Float32Rests(model) if recipe.run.precision == "bfloat16" and recipe.run.zero_stage == 3 else None
    with contextlib.redirect_stdout(io.StringIO()), keeping:  # DeepSpeed prints a page about memory for bfloat16
        if recipe.run.zero_stage == 3:
            device = torch.device(deepspeed.get_accelerator().current_device_name())
            _share_out(model, settings, torch.bfloat16 if recipe.run.precision == "bfloat16" else torch.float32, device)
        engine, optimizer, _, _ = deepspeed.initialize(model=model, optimizer=optimizer, config=settings)
    if ranks == 1 and recipe.run.zero_stage == 0:
        engine.enable_backward_allreduce = False
    engine.float32_rests = rests
    if rests:
        rests.attach(engine)
    return engine, optimizer
