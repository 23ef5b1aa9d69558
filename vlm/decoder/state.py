"""What a decoder keeps between calls: convolution window and SSM state of each Mamba layer, keys and values of each attention layer.

Size: the Mamba part does not grow with the text; only the few attention layers do. There is no position embedding, so a key may stand in
any slot as long as a mask says which slots count: ragged rows need no padding on the left.

Letters: B rows, S slots, H heads, P head width, N state, K convolution taps.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["DecoderState"]


@dataclass
class DecoderState:
    """State of B sequences. It is filled by `run_layers`; `select` copies rows (also repeated ones: that is how a prefix is forked).

    convolution: {layer: (B, K - 1, F)}; ssm: {layer: (B, H, P, N) float32}; keys, values: {layer: (B, KV heads, S, head width)}.
    slots: (B, S) bool, which slots hold a token of that row.
    """

    convolution: dict[int, Tensor] = field(default_factory=dict)
    ssm: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)
    values: dict[int, Tensor] = field(default_factory=dict)
    slots: Tensor | None = None
    is_compileable = False

    @property
    def seen_tokens(self) -> int:
        """Slots written so far (the longest row)."""
        return 0 if self.slots is None else self.slots.shape[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Transformers' name for `seen_tokens`; its `generate` asks."""
        return self.seen_tokens

    def append_slots(self, valid: Tensor) -> None:
        """valid (B, T) bool: which of the positions just written hold a token."""
        self.slots = valid if self.slots is None else torch.cat([self.slots, valid], dim=1)

    def select(self, rows: Tensor) -> "DecoderState":
        """A new state of the given rows (long tensor, repeats allowed); nothing is shared with this one."""
        pick = {
            name: {layer: tensor.index_select(0, rows) for layer, tensor in getattr(self, name).items()}
            for name in ("convolution", "ssm", "keys", "values")
        }
        return DecoderState(**pick, slots=None if self.slots is None else self.slots.index_select(0, rows))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """In place, for transformers' beam search."""
        chosen = self.select(beam_idx)
        self.convolution, self.ssm, self.keys, self.values, self.slots = (
            chosen.convolution,
            chosen.ssm,
            chosen.keys,
            chosen.values,
            chosen.slots,
        )

    def size_bytes(self) -> int:
        tensors = [tensor for name in ("convolution", "ssm", "keys", "values") for tensor in getattr(self, name).values()]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
