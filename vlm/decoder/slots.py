"""Rows of generation state in fixed buffers: what the engine decodes on, forks, and keeps.

`DecoderState` (state.py) is made anew by each call; here the buffers stay, so that a request can join or leave a running batch by copying
one row, a step writes in place, and a captured CUDA graph always finds the same memory. A kept prefix is such a buffer of one row.

Letters: R rows, S slots of a row (positions of its text), F convolution channels, K taps, H heads, P head width, N state, E head width.
"""

import itertools

import torch
from torch import Tensor, nn

from .attention import HybridAttention
from .mixer import Mamba2Mixer

__all__ = ["Slots"]

_GENERATIONS = itertools.count()


def _runs(origins: list[int], targets: list[int]) -> list[tuple[int, slice]]:
    """Origins, each with the stretch of neighbouring targets it is copied to."""
    runs: list[tuple[int, slice]] = []
    for origin, target in zip(origins, targets, strict=True):
        if runs and runs[-1][0] == origin and runs[-1][1].stop == target:
            runs[-1] = origin, slice(runs[-1][1].start, target + 1)
        else:
            runs.append((origin, slice(target, target + 1)))
    return runs


class Slots:
    """State of R sequences; row r has read `counts[r]` tokens, which also stand in `lengths` on the device.

    convolution: {layer: (R, K - 1, F)}; ssm: {layer: (R, H, P, N)}; keys, values: {layer: (R, KV heads, S, E)}. Key i of a row belongs to
    its token i. Unused slots hold zeros or an earlier request's finite numbers, never seen through the mask.
    """

    def __init__(self, language_model: nn.Module, rows: int, span: int, *, like: Tensor):
        """Buffers for `rows` sequences of up to `span` tokens, on the device and in the dtype of `like` (SSM states at least float32)."""
        self.convolution, self.ssm, self.keys, self.values = {}, {}, {}, {}
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        for block in language_model.model.layers:
            mixer = block.mixer
            if isinstance(mixer, Mamba2Mixer):
                self.convolution[mixer.layer_idx] = like.new_zeros(rows, mixer.conv_kernel_size - 1, mixer.conv_dim)
                self.ssm[mixer.layer_idx] = like.new_zeros(rows, mixer.num_heads, mixer.head_dim, mixer.ssm_state_size, dtype=wide)
            elif isinstance(mixer, HybridAttention):
                heads = mixer.config.num_key_value_heads
                for buffers in (self.keys, self.values):
                    buffers[mixer.layer_idx] = like.new_zeros(rows, heads, span, mixer.head_dim)
        self.lengths = torch.zeros(rows, dtype=torch.long, device=like.device)
        self.counts = [0] * rows
        self.rows, self.span = rows, span
        self.generation = next(_GENERATIONS)  # another one when buffers are exchanged: a graph captured on older ones is worthless

    def _parts(self) -> list[dict[int, Tensor]]:
        return [self.convolution, self.ssm, self.keys, self.values]

    def grow(self, rows: int, span: int) -> None:
        """Exchange the buffers for ones of exactly this size, layer by layer. Raises ValueError when a running row would not fit."""
        if rows < self.rows and any(self.counts[rows:]) or max(self.counts, default=0) > span:
            raise ValueError(f"rows of {self.counts} tokens do not fit into {rows} rows of {span} slots")
        kept = min(rows, self.rows)
        for part in self._parts():
            has_slots = part is self.keys or part is self.values
            for layer, old in part.items():
                used = min(span, self.span) if has_slots else old.shape[2]
                new = old.new_zeros(rows, old.shape[1], span if has_slots else used, *old.shape[3:])
                new[:kept, :, :used] = old[:kept, :, :used]
                part[layer] = new
        lengths = self.lengths.new_zeros(rows)
        lengths[:kept] = self.lengths[:kept]
        self.lengths, self.counts = lengths, (self.counts + [0] * rows)[:rows]
        self.rows, self.span = rows, span
        self.generation = next(_GENERATIONS)

    def fork(self, source: "Slots", origins: list[int], targets: list[int], *, with_ssm: bool = True) -> None:
        """Copy rows of `source` (this one too; repeats allowed among the origins) over rows of this. Nothing is shared afterwards.

        Without `with_ssm` the SSM states, most of a row, are left to the prefill that follows, which is told where they stand."""
        if not targets:
            return
        device = self.lengths.device
        origin, target = torch.tensor(origins, device=device), torch.tensor(targets, device=device)
        used = max(source.counts[row] for row in origins)
        runs = _runs(origins, targets)
        for part, given in zip(self._parts(), source._parts(), strict=True):
            if part is self.ssm and not with_ssm:
                continue
            for layer, tensor in part.items():
                origin_rows = given[layer]
                if part is self.keys or part is self.values:
                    tensor, origin_rows = tensor[:, :, :used], origin_rows[:, :, :used]
                if 4 * len(runs) > len(targets):
                    tensor.index_copy_(0, target, origin_rows.index_select(0, origin))
                else:  # thirty questions about one picture: one row spread over neighbours, without a copy in between
                    for row, places in runs:
                        tensor[places].copy_(origin_rows[row])
        self.lengths.index_copy_(0, target, source.lengths.index_select(0, origin))
        counts = [source.counts[row] for row in origins]
        for row, count in zip(targets, counts, strict=True):
            self.counts[row] = count

    def clear(self, rows: list[int]) -> None:
        """Set rows back to the state before any token; their keys may stay, for no mask shows them."""
        if rows:
            index = torch.tensor(rows, device=self.lengths.device)
            for part in (self.convolution, self.ssm):
                for tensor in part.values():
                    tensor.index_fill_(0, index, 0.0)
            self.lengths.index_fill_(0, index, 0)
            for row in rows:
                self.counts[row] = 0

    def vacate(self, rows) -> None:
        """Nobody uses these rows any more: `clear` them before somebody does. Until then they count as empty."""
        for row in rows:
            self.counts[row] = 0
            self.lengths[row] = 0

    def scrub(self, rows: list[int]) -> None:
        """`clear`, keys and values too: after a row of non-finite numbers, which even a weight of 0 would carry on."""
        self.clear(rows)
        for part in (self.keys, self.values):
            for tensor in part.values():
                tensor.index_fill_(0, torch.tensor(rows, device=self.lengths.device), 0.0)

    def advance(self, rows: list[int], tokens: list[int]) -> None:
        """Note that these rows have read so many tokens more; on the device as well."""
        for row, count in zip(rows, tokens, strict=True):
            self.counts[row] += count
        index = torch.tensor(rows, device=self.lengths.device)
        self.lengths.index_add_(0, index, torch.tensor(tokens, device=self.lengths.device))

    def size_bytes(self) -> int:
        return sum(tensor.numel() * tensor.element_size() for part in self._parts() for tensor in part.values())
