"""Our attention: transformers' parameters, a forward that knows packed rows and kept states.

The stock path builds a T x T mask for a pack, and leaks between packed samples while `use_cache` is on. Here a pack is attended
sequence by sequence, those of similar length side by side (side_by_side.py).

Letters: B batch, T positions, H query heads, E head width, S sequences of a group, L its longest.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHAttention

from .layout import Layout
from .state import DecoderState

__all__ = ["HybridAttention"]


class HybridAttention(NemotronHAttention):
    """Grouped-query attention without position embedding. Made from a stock layer by `HybridAttention.take_over(layer)`."""

    @classmethod
    def take_over(cls, mixer: NemotronHAttention) -> None:
        mixer.__class__ = cls

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        past_key_values=None,
        *,
        layout: Layout | None = None,
        state: DecoderState | None = None,
        **kwargs,
    ):
        """hidden_states (B, T, D) -> (B, T, D), None. Without `layout` (transformers' own loop) this is the stock forward."""
        if layout is None:
            return super().forward(hidden_states, attention_mask=attention_mask, past_key_values=past_key_values, **kwargs)
        query, key, value = (
            rearrange(project(hidden_states), "b t (h e) -> b h t e", e=self.head_dim)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        if layout.is_packed:
            out = self._packed(query, key, value, layout)
        else:
            mask = None
            if state is not None:
                if self.layer_idx in state.keys:
                    key = torch.cat([state.keys[self.layer_idx], key], dim=2)
                    value = torch.cat([state.values[self.layer_idx], value], dim=2)
                state.keys[self.layer_idx], state.values[self.layer_idx] = key, value
                if state.seen_tokens:
                    mask = self._mask_over_slots(state.slots, layout, query)
            if mask is None and not layout.right_padded:
                mask = self._mask_over_slots(layout.valid[:, :0], layout, query)
            out = self._attend(query, key, value, mask)
        return self.o_proj(rearrange(out, "b h t e -> b t (h e)")), None

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        repeats = self.num_key_value_groups
        if repeats > 1:
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=self.scaling)

    @staticmethod
    def _mask_over_slots(slots: Tensor, layout: Layout, query: Tensor) -> Tensor | None:
        """(B, 1, T, slots + T) bool: earlier slots that hold a token, then the positions up to and including one's own."""
        batch, _, length, _ = query.shape
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().expand(batch, -1, -1)
        if layout.valid is not None:
            causal = causal & layout.valid[:, None, :]
            # A padding query sees itself, so that its (unused) row of the softmax is finite.
            causal = causal | torch.eye(length, dtype=torch.bool, device=query.device)
        return torch.cat([slots[:, None, :].expand(-1, length, -1), causal], dim=-1)[:, None]

    def _packed(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> Tensor:
        """One row of packed sequences, (1, H, T, E) each."""
        groups = layout.side_by_side
        parts = zip(*(groups.spread(each[0].transpose(0, 1)) for each in (query, key, value)), strict=True)  # S L H E each
        attended = (self._attend(*(each.transpose(1, 2) for each in part), None) for part in parts)
        return groups.join([each.transpose(1, 2) for each in attended]).transpose(0, 1)[None]
