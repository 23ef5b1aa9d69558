"""Activation checkpointing of any vision encoder: its blocks keep their inputs alone and are computed again in the backward pass.

Towers come from several libraries, each with a switch of its own or none. Here a block's own `forward` is wrapped, so that neither the
tower's structure nor its weights' names change. The block is called as a module both times: under ZeRO-3 that is what brings its weights.
"""

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from train_vlm.freezing import encoder_blocks

__all__ = ["checkpoint_encoder"]


def checkpoint_encoder(encoder: nn.Module) -> int:
    """Wrap the blocks of `encoder`; returns how many there are. A block of which nothing trains runs once, as before.

    Raises ValueError for an encoder without a list of blocks, and for blocks that keep running statistics while they train: a block that
    runs twice would count every batch twice.
    """
    blocks = encoder_blocks(encoder)
    for block in blocks:
        for name, module in block.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training and module.track_running_stats:
                raise ValueError(
                    f"run.encoder_activation_checkpointing: {name} of a {type(block).__name__} keeps running statistics, which a second "
                    "pass would count twice; freeze the encoder or leave its activations as they are"
                )
    for block in blocks:
        _wrap(block)
    return len(blocks)


def _wrap(block: nn.Module) -> None:
    plain, is_inside = block.forward, False

    def forward(*arguments, **settings):
        nonlocal is_inside
        trains = torch.is_grad_enabled() and any(parameter.requires_grad for parameter in block.parameters())
        if is_inside or not trains:
            return plain(*arguments, **settings)
        return checkpoint(again, *arguments, use_reentrant=False, **settings)

    def again(*arguments, **settings):
        nonlocal is_inside
        is_inside = True
        try:
            return block(*arguments, **settings)
        finally:
            is_inside = False

    block.forward = forward
