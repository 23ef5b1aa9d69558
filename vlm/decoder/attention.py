"""Our attention: transformers' parameters, a forward that knows packed rows and kept states.

The stock path builds a T x T mask for a pack, and leaks between packed samples while `use_cache` is on. Here a pack is attended
sequence by sequence: sequences of similar length are laid side by side, padded on the right, where a causal mask already hides the padding.

Letters: B batch, T positions, H query heads, E head width, S sequences or slots.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHAttention

from .layout import Layout
from .state import DecoderState

__all__ = ["HybridAttention", "groups_of_similar_length"]

PADDING_LIMIT = 1.35  # longest over shortest sequence in one attention call


def groups_of_similar_length(lengths: tuple[int, ...]) -> list[list[int]]:
    """Indices of `lengths`, in groups whose longest is at most 1.35 times the shortest; shortest first."""
    groups: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if groups and lengths[index] <= PADDING_LIMIT * lengths[groups[-1][0]]:
            groups[-1].append(index)
        else:
            groups.append([index])
    return groups


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
        out = torch.zeros_like(query)
        starts = [0]
        for length in layout.lengths:
            starts.append(starts[-1] + length)
        places, results = [], []
        for group in groups_of_similar_length(layout.lengths):
            longest = max(layout.lengths[index] for index in group)
            offsets = torch.tensor([starts[index] for index in group], device=query.device)[:, None]
            sizes = torch.tensor([layout.lengths[index] for index in group], device=query.device)[:, None]
            steps = torch.arange(longest, device=query.device)[None]
            rows = offsets + steps.minimum(sizes - 1)  # S T: padding repeats the last position
            q, k, v = (rearrange(t[0].index_select(1, rows.flatten()), "h (s t) e -> s h t e", s=len(group)) for t in (query, key, value))
            real = (steps < sizes).flatten()
            places.append(rows.flatten()[real])
            results.append(rearrange(self._attend(q, k, v, None), "s h t e -> h (s t) e")[:, real])
        return out.index_copy(2, torch.cat(places), torch.cat(results, dim=1)[None])
