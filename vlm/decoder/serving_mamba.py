"""Mamba-2 over kept states: packed segments, and one token for each running row.

The arithmetic is that of mixer.py; see there and in ssd.py for what it means.

Letters: T packed positions, R rows, H heads, P head width, G groups, N state, F convolution channels, K taps, r heads per group.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .mixer import Mamba2Mixer
from .packing import Group, Packing
from .short_scan import CACHED_BYTES, LONGEST_SHORT, scan_step, short_scan
from .slots import Slots
from .ssd import chunk_scan

__all__ = ["MambaServing"]


class MambaServing:
    """One Mamba-2 layer on `Slots`."""

    def __init__(self, mixer: Mamba2Mixer):
        self.mixer = mixer
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
        """(T, H P) in float32: gate, then a norm for each group of channels."""
        norm = self.mixer.norm
        gated = (y.float() * F.silu(gate.float())).unflatten(-1, (-1, norm.group_size))
        normed = F.rms_norm(gated, (norm.group_size,), None, norm.variance_epsilon).flatten(-2)
        return (norm.weight * normed.to(dtype)).to(dtype)

    def _convolve(self, padded: Tensor) -> Tensor:
        """(.., T + K - 1, F) -> (.., T, F), activated: the sum over the taps, a stretch of positions at a time."""
        weight, bias = self.mixer.conv1d.weight.squeeze(1), self.mixer.conv1d.bias  # F K
        taps = weight.shape[1]
        length = padded.shape[-2] - taps + 1
        stretch = length if padded.is_cuda else max(1, CACHED_BYTES // (padded.numel() // padded.shape[-2] * padded.element_size()))
        parts = []
        for start in range(0, length, stretch):
            count = min(stretch, length - start)
            y = padded.narrow(-2, start, count) * weight[:, 0]
            if bias is not None:
                y += bias
            for tap in range(1, taps):
                y.addcmul_(padded.narrow(-2, start + tap, count), weight[:, tap])
            parts.append(self.mixer.act(y))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-2)

    def prefill(self, x: Tensor, packing: Packing, slots: Slots) -> Tensor:
        mixer = self.mixer
        gate, fed, dt = mixer.in_proj(x).split(self.sizes, dim=-1)

        # 1. Convolution, with the kept window in front of each segment.
        taps = mixer.conv_kernel_size
        tokens, heads, ends = packing.windows(taps)
        window = slots.convolution[self.layer]
        spread = fed.new_empty(packing.total + len(packing.lengths) * (taps - 1), fed.shape[-1])
        spread.index_copy_(0, heads, window.index_select(0, packing.row_index).flatten(0, 1))
        spread.index_copy_(0, tokens, fed)
        window.index_copy_(0, packing.row_index, spread.index_select(0, ends).unflatten(0, (-1, taps - 1)))
        convolved = self._convolve(spread).index_select(0, tokens - (taps - 1))

        # 2. Scan, from each row's own state.
        steps, A, D = self._time_steps(dt), -self._wide(mixer.A_log).exp(), self._wide(mixer.D)
        y = x.new_empty(packing.total, mixer.num_heads, mixer.head_dim)
        for group in packing.groups:
            inner, B, C = group.take(convolved).split(self.inner_sizes, dim=-1)
            dts = group.take(steps)
            if group.valid is not None:
                dts = dts * group.valid[..., None]  # padding neither decays nor feeds the state
            group.put(self._scan(inner, dts, A, B, C, D, slots, group), y)
        return mixer.out_proj(self._gated_norm(y.flatten(1), gate, x.dtype))

    def _scan(self, inner: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, slots: Slots, group: Group) -> Tensor:
        """(segments, L, ..) of a group -> (segments, L, H, P); its rows' states go on."""
        mixer, states = self.mixer, slots.ssm[self.layer]
        x = inner.unflatten(-1, (mixer.num_heads, -1))
        B, C = B.unflatten(-1, (mixer.n_groups, -1)), C.unflatten(-1, (mixer.n_groups, -1))
        if group.longest <= LONGEST_SHORT:
            own = states[group.row_slice] if group.row_slice is not None else states.index_select(0, group.rows)
            y = short_scan(x, steps, A, B, C, D, own, is_fresh=group.is_fresh)
            after = None if group.row_slice is not None else own
        else:
            before = None if group.is_fresh else states.index_select(0, group.rows)
            y, after = chunk_scan(x, steps, A, B, C, mixer.chunk_size, D=D, initial_states=before, return_final_states=True)
        if after is not None:
            states.index_copy_(0, group.rows, after)
        return y

    def decode(self, x: Tensor, slots: Slots, step) -> Tensor:
        mixer, rows = self.mixer, step[0]
        gate, fed, dt = mixer.in_proj(x).split(self.sizes, dim=-1)

        # 1. Convolution.
        window = slots.convolution[self.layer][:rows]
        padded = torch.cat([window, fed[:, None]], dim=1)  # R K F
        window.copy_(padded[:, 1:])
        inner, B, C = self._convolve(padded)[:, 0].split(self.inner_sizes, dim=-1)

        # 2. One step of the recurrence.
        wide = self._wide(inner).view(rows, mixer.num_heads, mixer.head_dim)
        B, C = (self._wide(tensor).view(rows, mixer.n_groups, -1) for tensor in (B, C))
        A, D = -self._wide(mixer.A_log).exp(), self._wide(mixer.D)
        y = scan_step(wide, self._time_steps(dt), A, B, C, D, slots.ssm[self.layer][:rows])
        return mixer.out_proj(self._gated_norm(y.view(rows, -1).to(x.dtype), gate, x.dtype))
