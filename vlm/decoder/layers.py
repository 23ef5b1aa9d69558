"""Run the blocks of a Nemotron-H decoder with our mixers: one loop for training, prefill and decoding.

transformers' own loop stays usable on the same model (it is the reference in the tests). This one exists because that loop passes no
kept state of ours, builds a T x T mask for packs, and differs between releases in which arguments reach a mixer.

Letters: B batch, T positions, D decoder width.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.activations import ReLUSquaredActivation
from transformers.models.nemotron_h.modeling_nemotron_h import (
    NemotronHAttention,
    NemotronHForCausalLM,
    NemotronHMamba2Mixer,
    NemotronHRMSNorm,
)

from .attention import HybridAttention
from .layout import Layout
from .mixer import Mamba2Mixer
from .norm import HybridNorm
from .squared_relu import HybridSquaredReLU
from .state import DecoderState

__all__ = ["run_layers", "take_over_mixers"]


def take_over_mixers(language_model: NemotronHForCausalLM) -> dict[str, int]:
    """Set our forward on every Mamba-2 and attention layer of this one model, its norms and activations; returns how many mixers of each
    kind."""
    counts = {"mamba": 0, "attention": 0}
    for module in language_model.modules():
        if isinstance(module, NemotronHMamba2Mixer):
            Mamba2Mixer.take_over(module)
            counts["mamba"] += 1
        elif isinstance(module, NemotronHAttention):
            HybridAttention.take_over(module)
            counts["attention"] += 1
        elif isinstance(module, NemotronHRMSNorm):
            HybridNorm.take_over(module)
        elif isinstance(module, ReLUSquaredActivation):
            HybridSquaredReLU.take_over(module)
    return counts


def _run_block(block: nn.Module, hidden: Tensor, layout: Layout, state: DecoderState | None) -> Tensor:
    normed = block.norm(hidden)
    if isinstance(block.mixer, Mamba2Mixer):
        mixed = block.mixer(normed, layout=layout, state=state)
    elif isinstance(block.mixer, HybridAttention):
        mixed, _ = block.mixer(normed, layout=layout, state=state)
    else:
        mixed = block.mixer(normed)
    return hidden + mixed


def run_layers(
    language_model: NemotronHForCausalLM,
    embeddings: Tensor,
    layout: Layout,
    state: DecoderState | None = None,
    *,
    activation_checkpointing: bool = False,
) -> Tensor:
    """embeddings (B, T, D) -> hidden states after the final norm (B, T, D), the input of the output head.

    With `state` the sequences continue from it and it is updated in place; rows must then be padded on the right. Raises ValueError when
    the layout does not fit the batch.
    """
    batch, length, _ = embeddings.shape
    expected = 1 if layout.is_packed else batch
    total = sum(layout.lengths) if layout.is_packed else None
    if batch != expected or (total is not None and total != length) or (not layout.is_packed and len(layout.lengths) != batch):
        raise ValueError(
            f"found a batch of {batch} x {length} positions; the layout describes {layout.lengths} (packed: {layout.is_packed})"
        )
    if state is not None and (layout.is_packed or not layout.right_padded):
        raise ValueError("a kept state needs one sequence a row, padded on the right; found a packed or left-padded batch")
    hidden = embeddings
    for block in language_model.model.layers:
        if activation_checkpointing and torch.is_grad_enabled():
            hidden = checkpoint(_run_block, block, hidden, layout, state, use_reentrant=False)
        else:
            hidden = _run_block(block, hidden, layout, state)
    if state is not None:
        valid = layout.valid
        state.append_slots(torch.ones(batch, length, dtype=torch.bool, device=hidden.device) if valid is None else valid)
    return language_model.model.norm_f(hidden)
