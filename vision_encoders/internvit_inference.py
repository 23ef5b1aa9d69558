"""InternViT for answering on a processor: the layers of transformers' InternVLVisionModel, written so that memory is touched less.

A picture of seven tiles asked one question costs more in the encoder than in the decoder, and there a third of the time went into fresh
buffers and passes over them: scaled outputs, sums, activations. Here residuals and activations are computed in place. The weights are
read where they are. The tower's own forward is the reference in the tests, and what trains.

Letters: N tiles, P patches, C vision width, H heads, E head width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["can_run_in_place", "features_in_place"]


def can_run_in_place(tower: nn.Module) -> bool:
    """Whether the layers are what this file computes: on a CPU, in eval mode, with plain linear layers and the exact GELU."""
    if tower.training or next(tower.parameters()).device.type != "cpu":
        return False
    for layer in tower.encoder.layer:
        attention, mlp = layer.attention, layer.mlp
        linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.projection_layer, mlp.fc1, mlp.fc2)
        if any(type(linear) is not nn.Linear or linear._forward_hooks or linear._forward_pre_hooks for linear in linears):
            return False
    return tower.config.hidden_act == "gelu" and tower.config._attn_implementation in ("sdpa", "eager")


def features_in_place(tower: nn.Module, pixel_values: Tensor) -> Tensor:
    """pixel_values (N, 3, H, W) -> (N, 1 + P, C), the tower's last hidden state. For inference mode only: nothing here has a gradient."""
    hidden = tower.embeddings(pixel_values)
    hidden = (hidden[0] if isinstance(hidden, tuple) else hidden).contiguous()  # N 1+P C
    for layer in tower.encoder.layer:
        hidden.addcmul_(_attend(layer.attention, layer.layernorm_before(hidden)), layer.lambda_1)
        widened = torch.ops.aten.gelu_(layer.mlp.fc1(layer.layernorm_after(hidden)))
        hidden.addcmul_(layer.mlp.fc2(widened), layer.lambda_2)
    return tower.layernorm(hidden)


def _attend(attention: nn.Module, normed: Tensor) -> Tensor:
    tiles, length, width = normed.shape
    projected = (attention.q_norm(attention.q_proj(normed)), attention.k_norm(attention.k_proj(normed)), attention.v_proj(normed))
    query, key, value = (part.view(tiles, length, attention.num_heads, -1).transpose(1, 2) for part in projected)  # N H 1+P E
    attended = F.scaled_dot_product_attention(query, key, value, scale=attention.scale)
    return attention.projection_layer(attended.transpose(1, 2).reshape(tiles, length, width))
