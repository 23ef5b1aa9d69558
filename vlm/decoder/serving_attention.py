"""Grouped-query attention over kept keys: packed segments, and one token for each running row.

Letters: T packed positions, R rows, S slots, H query heads, KV key heads, E head width, G segments of a group, L longest of a group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention import HybridAttention
from .decode_step import Step
from .packed_weights import PackedWeights
from .packing import Group, Packing
from .shared_attention import attend_shared
from .slots import Common, Slots

__all__ = ["AttentionServing"]

CACHED_SCORES = 2**19
"""Of queries on keys that a processor computes at a time."""

MASK_ELEMENTS = 2**26
"""Of a mask that exists at once. A part of a prompt of 100,000 tokens would else have one of tens of gigabytes."""


class AttentionServing:
    """One attention layer on `Slots`."""

    def __init__(self, mixer: HybridAttention, packed: PackedWeights):
        self.mixer = mixer
        self.inward = tuple(packed.of(project) for project in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
        self.o_proj = packed.of(mixer.o_proj)
        self.layer = mixer.layer_idx
        self.width = mixer.head_dim
        self.repeats = mixer.num_key_value_groups

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(T, D) -> query (T, H, E), key and value (T, KV, E)."""
        return tuple(project(x).unflatten(-1, (-1, self.width)) for project in self.inward)

    def prefill(self, x: Tensor, packing: Packing, slots: Slots, wanted: Tensor | None = None) -> Tensor:
        """x (T, D) -> (T, D); with `wanted`, places in the pack, only what comes out there."""
        query, key, value = self._project(x)
        self._write(slots, key, value, *packing.positions)
        out = torch.empty_like(query)
        for group in packing.groups:
            q = group.take(query).transpose(1, 2)  # G H L E
            if group.is_fresh:
                # Without a past, padding behind a segment is hidden by the causal mask already.
                k, v = (group.take(tensor).transpose(1, 2).repeat_interleave(self.repeats, dim=1) for tensor in (key, value))
                attended = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.mixer.scaling)
            elif group.common is not None and not x.is_cuda:
                attended = self._continue_common(q, *(group.take(tensor).transpose(1, 2) for tensor in (key, value)), group.common)
            else:
                k, v = (self._kept(buffers[self.layer], group) for buffers in (slots.keys, slots.values))  # G KV span E
                step = max(1, MASK_ELEMENTS // (group.size * self.repeats * group.span))
                parts = [self._continue(q, k, v, group, start, min(start + step, group.longest)) for start in range(0, group.longest, step)]
                attended = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
            group.put(attended.transpose(1, 2), out)
        out = out.flatten(1)
        return self.o_proj(out if wanted is None else out.index_select(0, wanted))

    def _write(self, slots: Slots, key: Tensor, value: Tensor, rows: Tensor, places: Tensor) -> None:
        """Put key and value (T, KV, E) of tokens into these rows and slots (T,)."""
        heads = torch.arange(key.shape[1], device=rows.device)
        flat = ((rows[:, None] * key.shape[1] + heads) * slots.span + places[:, None]).flatten()
        slots.keys[self.layer].flatten(0, 2).index_copy_(0, flat, key.flatten(0, 1))
        slots.values[self.layer].flatten(0, 2).index_copy_(0, flat, value.flatten(0, 1))

    @staticmethod
    def _kept(buffer: Tensor, group: Group) -> Tensor:
        """Keys or values of the group's rows, (G, KV, span, E)."""
        seen = buffer[:, :, : group.span]
        return seen[group.row_slice] if group.row_slice is not None else seen.index_select(0, group.rows)

    def _continue(self, query: Tensor, key: Tensor, value: Tensor, group: Group, start: int, stop: int) -> Tensor:
        """query (G, H, L, E), key and value (G, KV, span, E) -> what positions start to stop of the segments see, (G, H, stop - start, E).
        A token sees its row's slots up to its own. Padding sees what lies there, finite, and is not used."""
        span = group.span if group.size > 1 else group.span - group.longest + stop  # of a single one the last slot that any of them sees
        device = group.rows.device
        own = group.past[:, None] + torch.arange(start, stop, device=device)  # G L
        mask = (torch.arange(span, device=device) <= own[..., None])[:, None].repeat(1, 1, self.repeats, 1)
        # The query heads that share a key head stand one after the other where positions would: nothing is repeated over the slots.
        folded = query[:, :, start:stop].unflatten(1, (-1, self.repeats)).flatten(2, 3)  # G KV r L E
        out = F.scaled_dot_product_attention(folded, key[:, :, :span], value[:, :, :span], attn_mask=mask, scale=self.mixer.scaling)
        return out.unflatten(2, (self.repeats, -1)).flatten(1, 2)

    def _continue_common(self, query: Tensor, key: Tensor, value: Tensor, common: Common) -> Tensor:
        """query (G, H, L, E), key and value (G, KV, L, E) of segments that all go on from `common` -> (G, H, L, E). Of what was read before
        there is one copy for all; a few segments at a time, so that their scores stay in the cache."""
        segments, heads, length, _ = query.shape
        past = [part[self.layer][common.row, :, : common.tokens] for part in (common.source.keys, common.source.values)]
        causal = torch.ones(length, length, dtype=torch.bool, device=query.device).tril().repeat(self.repeats, 1)  # r L, L
        step = max(1, CACHED_SCORES // (heads * length * (common.tokens + length)))
        out = torch.empty_like(query)
        for start in range(0, segments, step):
            some = slice(start, start + step)
            # The query heads that share a key head stand one after the other where positions would.
            folded = query[some].unflatten(1, (-1, self.repeats)).flatten(2, 3)  # G KV r L E
            attended = attend_shared(folded, *past, key[some], value[some], causal, self.mixer.scaling)
            out[some] = attended.unflatten(2, (self.repeats, -1)).flatten(1, 2)
        return out

    def decode(self, x: Tensor, slots: Slots, step: Step) -> Tensor:
        query, key, value = self._project(x)
        self._write(slots, key, value, step.index, step.lengths)
        # The query heads that share a key head stand where positions would: nothing is repeated over the slots.
        q = query.unflatten(1, (-1, self.repeats))  # R KV r E
        parts = [self._attend(q, slots, step, some, common) for some, common in step.sharing]
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return self.o_proj(out.reshape(step.rows, -1))

    def _attend(self, query: Tensor, slots: Slots, step: Step, some: slice, common: Common | None) -> Tensor:
        """query (R, KV, r, E) of all rows -> what comes out for `some` of them."""
        scale = self.mixer.scaling
        k, v = (buffers[self.layer][some, :, : step.span] for buffers in (slots.keys, slots.values))  # R KV span E
        visible = None if step.visible is None else step.visible[some]
        if common is None:
            return F.scaled_dot_product_attention(query[some], k, v, attn_mask=visible, scale=scale)
        own = slice(common.tokens, None)
        shared = (part[self.layer][common.row, :, : common.tokens] for part in (common.source.keys, common.source.values))
        return attend_shared(query[some], *shared, k[:, :, own], v[:, :, own], None if visible is None else visible[..., own], scale)
