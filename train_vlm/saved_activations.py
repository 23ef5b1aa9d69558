"""How much a forward pass leaves for the backward pass: an estimate from shapes, for the plan of a run.

The encoder, when it trains, is run once on shapes and what autograd keeps is added up. Without a device attention comes in plain pieces
there, whose matrices of scores a fused kernel never keeps: these are left out. The decoder is estimated: block inputs, and inside a block
three numbers for each of its widest layer's outputs (before and behind the activation, and its square or gate). With activation
checkpointing only one block is open at a time.
"""

import torch
from torch import nn
from torch.func import functional_call

from train_vlm.freezing import encoder_blocks
from vlm.modeling import VisionLanguageModel

__all__ = ["activation_bytes", "kept_by_encoder"]

KEPT_IN_BLOCK = 3


def kept_by_encoder(encoder: nn.Module, checkpointing: bool = False) -> int:
    """Numbers that autograd keeps for one tile; 0 for a frozen encoder. Views of one memory count once, weights do not.

    With `checkpointing`: the inputs of its blocks, and one block open (all are taken to keep alike).
    """
    if not any(p.requires_grad for p in encoder.parameters()):
        return 0
    tensors = {name: torch.empty_like(p, device="meta").requires_grad_(p.requires_grad) for name, p in encoder.named_parameters()}
    tensors |= {name: torch.empty_like(buffer, device="meta") for name, buffer in encoder.named_buffers()}
    pixels = torch.empty(1, 3, encoder.image_size, encoder.image_size, device="meta", dtype=encoder.weight_dtype)
    weights = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
    kept: dict[int, torch.Tensor] = {}  # the tensors stay alive, so that no memory is given out twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()._cdata
        # Scores: for each head a square of positions, and there is one tile.
        is_scores = tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2] and tensor.numel() > tensor.shape[-1] ** 2
        if memory not in weights and (not is_scores or memory == pixels.untyped_storage()._cdata):
            kept[memory] = tensor
        return tensor

    blocks, inputs = encoder_blocks(encoder) if checkpointing else [], []
    hooks = [block.register_forward_pre_hook(lambda _, given: inputs.append(given[0].numel())) for block in blocks]
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        functional_call(encoder, tensors, (pixels,))
    for hook in hooks:
        hook.remove()
    everything = sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())
    return sum(inputs) + everything // len(blocks) if blocks else everything


def activation_bytes(
    model: VisionLanguageModel,
    tokens: float,
    tiles: float,
    *,
    checkpointing: bool,
    bytes_a_number: int,
    encoder_checkpointing: bool = False,
) -> float:
    """Bytes kept for the backward pass of one pack of `tokens` positions and `tiles` tiles."""
    hidden = model.config.text_config.hidden_size
    numbers = tiles * kept_by_encoder(model.vision_encoder, encoder_checkpointing)
    inside = []
    for block in model.language_model.model.layers:
        widths = [module.out_features for module in block.mixer.modules() if isinstance(module, nn.Linear)]
        inside.append(KEPT_IN_BLOCK * max(widths, default=hidden))
    numbers += tokens * (hidden * len(inside) + (max(inside) if checkpointing else sum(inside)))
    return numbers * bytes_a_number
