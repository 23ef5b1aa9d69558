"""How much a forward pass leaves for the backward pass: an estimate from shapes, for the plan of a run.

The encoder and the projector are run once on shapes and what autograd keeps is added up. Without a device attention comes in plain pieces
there, whose matrices of scores a fused kernel never keeps: these are left out. The decoder is estimated: block inputs, and inside a block
three numbers for each of its widest layer's outputs (before and behind the activation, and its square or gate). With activation
checkpointing only one block is open at a time; the projector has no blocks and keeps everything.
"""

import torch
from torch import nn
from torch.func import functional_call

from train_vlm.freezing import encoder_blocks
from vlm.modeling import VisionLanguageModel

__all__ = ["activation_bytes", "kept_by_encoder", "kept_by_projector"]

KEPT_IN_BLOCK = 3


def _run_on_shapes(module: nn.Module, given: torch.Tensor) -> int:
    """Numbers that autograd keeps when `module` runs on `given` (on the meta device). Views of one memory count once, weights do not."""
    tensors = {name: torch.empty_like(p, device="meta").requires_grad_(p.requires_grad) for name, p in module.named_parameters()}
    tensors |= {name: torch.empty_like(buffer, device="meta") for name, buffer in module.named_buffers()}
    weights = {tensor.untyped_storage()._cdata for tensor in tensors.values()}
    kept: dict[int, torch.Tensor] = {}  # the tensors stay alive, so that no memory is given out twice

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()._cdata
        # Scores: for each head a square of positions, and there is one tile.
        is_scores = tensor.ndim > 2 and tensor.shape[-1] == tensor.shape[-2] and tensor.numel() > tensor.shape[-1] ** 2
        if memory not in weights and (not is_scores or memory == given.untyped_storage()._cdata):
            kept[memory] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        functional_call(module, tensors, (given,))
    return sum(tensor.untyped_storage().nbytes() // tensor.element_size() for tensor in kept.values())


def _trains(module: nn.Module) -> bool:
    return any(p.requires_grad for p in module.parameters())


def kept_by_encoder(encoder: nn.Module, checkpointing: bool = False) -> int:
    """Numbers that autograd keeps for one tile; 0 for a frozen encoder. Views of one memory count once, weights do not.

    With `checkpointing`: the inputs of its blocks, and one block open (all are taken to keep alike).
    """
    if not _trains(encoder):
        return 0
    pixels = torch.empty(1, 3, encoder.image_size, encoder.image_size, device="meta", dtype=encoder.weight_dtype)
    blocks, inputs = encoder_blocks(encoder) if checkpointing else [], []
    hooks = [block.register_forward_pre_hook(lambda _, given: inputs.append(given[0].numel())) for block in blocks]
    everything = _run_on_shapes(encoder, pixels)
    for hook in hooks:
        hook.remove()
    return sum(inputs) + everything // len(blocks) if blocks else everything


def kept_by_projector(model: VisionLanguageModel) -> int:
    """Numbers that autograd keeps in the projector for one tile; a frozen one still hands a gradient on to an encoder that trains."""
    encoder_trains = _trains(model.vision_encoder)
    if not (encoder_trains or _trains(model.projector)):
        return 0
    vision = model.config.vision_config
    shape = (1, (vision.image_size // vision.patch_size) ** 2, vision.hidden_size)
    dtype = next(model.projector.parameters()).dtype
    return _run_on_shapes(model.projector, torch.empty(shape, device="meta", dtype=dtype).requires_grad_(encoder_trains))


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
    numbers = tiles * (kept_by_encoder(model.vision_encoder, encoder_checkpointing) + kept_by_projector(model))
    inside = []
    for block in model.language_model.model.layers:
        widths = [module.out_features for module in block.mixer.modules() if isinstance(module, nn.Linear)]
        inside.append(KEPT_IN_BLOCK * max(widths, default=hidden))
    numbers += tokens * (hidden * len(inside) + (max(inside) if checkpointing else sum(inside)))
    return numbers * bytes_a_number
