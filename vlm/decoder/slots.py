"""Rows of generation state in fixed buffers: what the engine decodes on, forks, and keeps.

`DecoderState` (state.py) is made anew by each call; here the buffers stay, so that a request can join or leave a running batch by copying
one row, a step writes in place, and a captured CUDA graph always finds the same memory. A kept prefix is such a buffer of one row.

Letters: R rows, S slots of a row (positions of its text), F convolution channels, K taps, H heads, P head width, N state, E head width.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .attention import HybridAttention
from .mixer import Mamba2Mixer
from .tails import Tails, pay_off

__all__ = ["Common", "Slots"]

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


@dataclass(frozen=True, eq=False)
class Common:
    """A row of these slots, with so many tokens read, that other rows go on from. It is not written to while they do."""

    source: "Slots"
    row: int
    tokens: int


def _copy_rows(part: dict[int, Tensor], given: dict[int, Tensor], origins: list[int], targets: list[int], used: int | None) -> None:
    """Rows of `given` over rows of `part`; of keys and values the first `used` slots."""
    if not targets or not part:
        return
    device = next(iter(part.values())).device
    origin, target = torch.tensor(origins, device=device), torch.tensor(targets, device=device)
    runs = _runs(origins, targets)
    for layer, tensor in part.items():
        origin_rows = given[layer]
        if used is not None:
            tensor, origin_rows = tensor[:, :, :used], origin_rows[:, :, :used]
        if 4 * len(runs) > len(targets):
            tensor.index_copy_(0, target, origin_rows.index_select(0, origin))
        else:  # thirty questions about one picture: one row spread over neighbours, without a copy in between
            for row, places in runs:
                tensor[places].copy_(origin_rows[row])


class Slots:
    """State of R sequences; row r has read `counts[r]` tokens, which also stand in `lengths` on the device.

    convolution: {layer: (R, K - 1, F)}; ssm: {layer: (R, H, P, N)}; keys, values: {layer: (R, KV heads, S, E)}. Key i of a row belongs to
    its token i. Unused slots hold zeros or an earlier request's finite numbers, never seen through the mask.

    common[r]: what row r was forked from together with others, if that is known; its keys and values are copies of that row's, its SSM
    state goes on from there. is_tail[r]: its SSM state does not stand in `ssm` but is that common one with the row's tail (tails.py).
    """

    def __init__(self, language_model: nn.Module, rows: int, span: int, *, like: Tensor, with_tails: bool = False):
        """Buffers for `rows` sequences of up to `span` tokens, on the device and in the dtype of `like` (SSM states at least float32).
        `with_tails`: rows may have tails, where the states are large enough for it."""
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
        self.common: list[Common | None] = [None] * rows
        self.is_tail = [False] * rows
        self.tails: Tails | None = None
        if with_tails and rows and any(pay_off(state[0].nbytes) for state in self.ssm.values()):
            self.tails = Tails(language_model, rows, like=like.new_empty(0, dtype=wide))
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
        self.common, self.is_tail = (self.common + [None] * rows)[:rows], (self.is_tail + [False] * rows)[:rows]
        if self.tails is not None:
            self.tails.grow(rows)
        self.rows, self.span = rows, span
        self.generation = next(_GENERATIONS)

    def fork(self, source: "Slots", origins: list[int], targets: list[int], *, with_ssm: bool = True) -> None:
        """Copy rows of `source` (this one too; repeats allowed among the origins) over rows of this. Nothing is shared afterwards.

        Without `with_ssm` the SSM states, most of a row, are left to the prefill that follows, which is told where they stand."""
        if not targets:
            return
        device = self.lengths.device
        used = max(source.counts[row] for row in origins)
        for part, given in zip(self._parts(), source._parts(), strict=True):
            if part is not self.ssm:
                _copy_rows(part, given, origins, targets, used if part is self.keys or part is self.values else None)
        if with_ssm:
            pairs = list(zip(origins, targets, strict=True))
            whole = [pair for pair in pairs if not source.is_tail[pair[0]]]
            _copy_rows(self.ssm, source.ssm, [row for row, _ in whole], [row for _, row in whole], None)
            self._fork_tails(source, [pair for pair in pairs if source.is_tail[pair[0]]])
        target = torch.tensor(targets, device=device)
        self.lengths.index_copy_(0, target, source.lengths.index_select(0, torch.tensor(origins, device=device)))
        within = source is self  # elsewhere nobody keeps what a row was forked from
        copied = [(source.counts[row], source.common[row] if within else None, within and source.is_tail[row]) for row in origins]
        for row, (count, common, is_tail) in zip(targets, copied, strict=True):
            self.counts[row], self.common[row], self.is_tail[row] = count, common, is_tail

    def _fork_tails(self, source: "Slots", pairs: list[tuple[int, int]]) -> None:
        """Rows with tails over other rows: as tails within these buffers, as states of their own elsewhere."""
        if pairs and source is self:
            origins, targets = (torch.tensor(rows, device=self.lengths.device) for rows in zip(*pairs, strict=True))
            self.tails.move(origins, targets, max(self.tail_length(row) for row, _ in pairs))
            return
        for origin, target in pairs:
            source._write_state(origin, self.ssm, target)

    def tail_length(self, row: int) -> int:
        """Tokens in the tail of a row that has one."""
        return self.counts[row] - self.common[row].tokens

    def _write_state(self, row: int, ssm: dict[int, Tensor], target: int) -> None:
        """What the SSM states of a row with a tail would be, into row `target` of these buffers."""
        common, length = self.common[row], self.tail_length(row)
        for layer, tail in self.tails.layers.items():
            ssm[layer][target] = tail.rows(slice(row, row + 1)).first(length).state(common.source.ssm[layer][common.row])[0]

    def settle(self, rows: list[int]) -> None:
        """Give rows with tails an SSM state of their own."""
        for row in rows:
            if self.is_tail[row]:
                self._write_state(row, self.ssm, row)
                self.is_tail[row] = False

    def stretches(self, rows: int, *, of_tails: bool) -> list[tuple[slice, Common | None]]:
        """The first `rows` rows in stretches of neighbours that have the same common row - and, `of_tails`, their tails on it - or None."""
        found: list[tuple[slice, Common | None]] = []
        for row in range(rows):
            common = self.common[row] if not of_tails or self.is_tail[row] else None
            if found and found[-1][1] is common:
                found[-1] = slice(found[-1][0].start, row + 1), common
            else:
                found.append((slice(row, row + 1), common))
        return found

    def clear(self, rows: list[int]) -> None:
        """Set rows back to the state before any token; their keys may stay, for no mask shows them."""
        if rows:
            index = torch.tensor(rows, device=self.lengths.device)
            for part in (self.convolution, self.ssm):
                for tensor in part.values():
                    tensor.index_fill_(0, index, 0.0)
            self.lengths.index_fill_(0, index, 0)
            for row in rows:
                self.counts[row], self.common[row], self.is_tail[row] = 0, None, False

    def vacate(self, rows) -> None:
        """Nobody uses these rows any more: `clear` them before somebody does. Until then they count as empty."""
        for row in rows:
            self.counts[row], self.common[row], self.is_tail[row] = 0, None, False
            self.lengths[row] = 0

    def scrub(self, rows: list[int]) -> None:
        """`clear`, keys, values and tails too: after a row of non-finite numbers, which even a weight of 0 would carry on."""
        if not rows:
            return
        self.clear(rows)
        if self.tails is not None:
            self.tails.scrub(torch.tensor(rows, device=self.lengths.device))
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
        own = sum(tensor.numel() * tensor.element_size() for part in self._parts() for tensor in part.values())
        return own + (self.tails.size_bytes() if self.tails is not None else 0)
