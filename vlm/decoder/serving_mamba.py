"""Mamba-2 over kept states: packed segments, and one token for each running row.

The arithmetic is that of mixer.py; see there and in ssd.py for what it means.

Letters: T packed positions, R rows, H heads, P head width, G groups, N state, F convolution channels, K taps, r heads per group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .decode_step import Step
from .gated_norm import gated_norm
from .mixer import Mamba2Mixer
from .packed_weights import PackedWeights
from .packing import Group, Packing
from .serving_convolution import ServingConvolution
from .short_scan import LONGEST_SHORT, scan_step, short_scan
from .slots import Slots
from .ssd import chunk_scan
from .step_kernel import fast_step

__all__ = ["MambaServing"]


class MambaServing:
    """One Mamba-2 layer on `Slots`."""

    def __init__(self, mixer: Mamba2Mixer, packed: PackedWeights):
        self.mixer = mixer
        self.convolution = ServingConvolution(mixer)
        self.in_proj, self.out_proj = packed.of(mixer.in_proj), packed.of(mixer.out_proj)
        self.layer = mixer.layer_idx
        self.sizes = [mixer.intermediate_size, mixer.conv_dim, mixer.num_heads]
        state = mixer.n_groups * mixer.ssm_state_size
        self.inner_sizes = [mixer.intermediate_size, state, state]

    @staticmethod
    def _wide(tensor: Tensor) -> Tensor:
        return tensor if tensor.dtype == torch.float64 else tensor.float()

    def _time_steps(self, dt: Tensor) -> Tensor:
        """(.., H) -> (.., H), float32 at least."""
        steps = F.softplus(self._wide(dt) + self._wide(self.mixer.dt_bias))
        low, high = self.mixer.dt_limit
        return steps.clamp(low, high) if low > 0.0 or high < float("inf") else steps

    def _gated_norm(self, y: Tensor, gate: Tensor, dtype: torch.dtype) -> Tensor:
        """(T, H P): gate, then a norm for each group of channels, in float32."""
        norm = self.mixer.norm
        return gated_norm(y, gate, norm.weight, self.mixer.n_groups, norm.variance_epsilon).to(dtype)

    def prefill(self, x: Tensor, packing: Packing, slots: Slots, wanted: Tensor | None = None) -> Tensor:
        """x (T, D) -> (T, D); with `wanted`, places in the pack, only what comes out there."""
        mixer = self.mixer
        gate, fed, dt = self.in_proj(x).split(self.sizes, dim=-1)

        # 1. Convolution, with the kept window in front of each segment.
        window = slots.convolution[self.layer]
        before = window.index_select(0, packing.row_index)
        convolved, after = self.convolution.packed(fed, before, packing.borders(mixer.conv_kernel_size))
        window.index_copy_(0, packing.row_index, after)

        # 2. Scan, from each row's own state.
        steps, A, D = self._time_steps(dt), -self._wide(mixer.A_log).exp(), self._wide(mixer.D)
        y = x.new_empty(packing.total, mixer.num_heads, mixer.head_dim)
        for group in packing.groups:
            inner, B, C = group.take(convolved).split(self.inner_sizes, dim=-1)
            dts = group.take(steps)
            if group.valid is not None:
                dts = dts * group.valid[..., None]  # padding neither decays nor feeds the state
            group.put(self._scan(inner, dts, A, B, C, D, slots, group), y)
        y = y.flatten(1)
        if wanted is not None:
            y, gate = y.index_select(0, wanted), gate.index_select(0, wanted)
        return self.out_proj(self._gated_norm(y, gate, x.dtype))

    def _scan(self, inner, steps, A, B, C, D, slots: Slots, group: Group) -> Tensor:
        """(segments, L, ..) of a group -> (segments, L, H, P); its rows' states go on, from what they hold or from the common state."""
        mixer, states, common = self.mixer, slots.ssm[self.layer], group.common
        x = inner.unflatten(-1, (mixer.num_heads, -1))
        B, C = B.unflatten(-1, (mixer.n_groups, -1)), C.unflatten(-1, (mixer.n_groups, -1))
        state = None if common is None else common.source.ssm[self.layer][common.row]
        if group.as_tails:
            tails = slots.tails.layers[self.layer]
            stand = group.row_slice is not None
            tail = tails.rows(group.row_slice).first(group.longest) if stand else tails.empty(group.size, group.longest)
            y = short_scan(x, steps, A, B, C, D, states[: group.size], common=state, tail=tail)
            if not stand:
                tails.write(group.rows, tail)
            return y
        if group.longest <= LONGEST_SHORT:
            if group.row_slice is not None:
                own = states[group.row_slice]
            else:  # what stands there is read only without a common state
                own = states.index_select(0, group.rows) if state is None else states.new_empty(group.size, *state.shape)
            y = short_scan(x, steps, A, B, C, D, own, is_fresh=group.is_fresh, common=state)
            after = None if group.row_slice is not None else own
        else:
            before = states.index_select(0, group.rows) if state is None else state.expand(group.size, *state.shape)
            before = None if group.is_fresh else before
            y, after = chunk_scan(x, steps, A, B, C, mixer.chunk_size, D=D, initial_states=before, return_final_states=True)
        if after is not None:
            states.index_copy_(0, group.rows, after)
        return y

    def decode(self, x: Tensor, slots: Slots, step: Step) -> Tensor:
        mixer, rows = self.mixer, step.rows
        gate, fed, dt = self.in_proj(x).split(self.sizes, dim=-1)

        # 1. Convolution.
        window = slots.convolution[self.layer][:rows]
        padded = torch.cat([window, fed[:, None]], dim=1)  # R K F
        window.copy_(padded[:, 1:])
        inner, B, C = self.convolution.rows(padded)[:, 0].split(self.inner_sizes, dim=-1)

        # 2. One step of the recurrence.
        wide = self._wide(inner).view(rows, mixer.num_heads, mixer.head_dim)
        B, C = (self._wide(tensor).view(rows, mixer.n_groups, -1) for tensor in (B, C))
        A, D = -self._wide(mixer.A_log).exp(), self._wide(mixer.D)
        y = self._recur(wide, self._time_steps(dt), A, B, C, D, slots, step)
        return self.out_proj(self._gated_norm(y.view(rows, -1).to(x.dtype), gate, x.dtype))

    def _recur(self, x: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, slots: Slots, step: Step) -> Tensor:
        """(R, H, P) -> the same: rows with a tail add to it, the others' states go on."""
        states = slots.ssm[self.layer]
        if len(step.tails) == 1 and step.tails[0][1] is None:
            make = fast_step(x.device) if x.is_cuda and states.dtype == torch.float32 else None
            return (make or scan_step)(x, steps, A, B, C, D, states[: step.rows])
        y = torch.empty_like(x)
        for some, common, part in step.tails:
            given = (x[some], steps[some], A, B[some], C[some], D)
            if common is None:
                y[some] = scan_step(*given, states[some])
            else:
                y[some] = part.scan(*given, slots.tails.layers[self.layer], common.source.ssm[self.layer][common.row])
        return y
