"""Our Mamba-2 mixer: transformers' parameters, our own forward.

The stock forward cannot serve here: without kernels it drops or refuses `seq_idx`, right padding decays its state, its time-step clamp
is hard-coded to `time_step_min`, and its fused path reads `out_proj.weight` raw, past any wrapper (LoRA, FP8) around the layer. This
subclass is set on the instances of our model after construction; transformers' own class is never touched and stays the reference.

Letters: B batch, T positions, H heads, P head width, G groups, N state, F convolution channels.
"""

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

from .convolution import causal_convolution
from .gated_norm import GatedNorm
from .layout import Layout
from .ssd import chunk_scan, state_update, time_steps
from .state import DecoderState

__all__ = ["Mamba2Mixer"]


class Mamba2Mixer(NemotronHMamba2Mixer):
    """Mamba-2 (arXiv 2405.21060) as Nemotron-H uses it. Made from a stock mixer by `Mamba2Mixer.take_over(mixer)`.

    rests: {A_log, D or dt_bias: (H,), norm.weight: (H P,), float32} to be added to a parameter that a trainer had to round.
    """

    rests: Mapping[str, Tensor] = MappingProxyType({})

    @classmethod
    def take_over(cls, mixer: NemotronHMamba2Mixer) -> None:
        """Give an existing mixer this forward; its parameters stay the same objects."""
        mixer.__class__ = cls
        # NVIDIA's meaning of the clamp (facts: `time_step_limit`, normally 0 to infinity), not `time_step_min`.
        mixer.has_silu = mixer.activation in ("silu", "swish")
        mixer.dt_limit = tuple(float(limit) for limit in mixer.config.time_step_limit)

    def forward(
        self,
        hidden_states: Tensor,
        cache_params=None,
        attention_mask: Tensor | None = None,
        *,
        layout: Layout | None = None,
        state: DecoderState | None = None,
        **kwargs,
    ) -> Tensor:
        """hidden_states (B, T, D) -> (B, T, D). With `state`, continues and updates that state.

        Called by transformers' own layer loop (no `layout`) it understands `attention_mask` (B, T) and `seq_idx` (1, T); with
        transformers' cache it hands over to the stock forward.
        """
        if cache_params is not None:
            return super().forward(hidden_states, cache_params=cache_params, attention_mask=attention_mask, **kwargs)
        batch, length, _ = hidden_states.shape
        if layout is None:
            layout = self._layout_from_transformers(hidden_states, attention_mask, kwargs.get("seq_idx"))
        state_size = self.n_groups * self.ssm_state_size

        gate, fed, dt = self.in_proj(hidden_states).split([self.intermediate_size, self.conv_dim, self.num_heads], dim=-1)
        if layout.valid is not None:
            fed = fed * layout.valid[..., None]  # after the projection, whose bias would otherwise reach the first windows
        kept = state.convolution.get(self.layer_idx) if state is not None else None
        fed, window = causal_convolution(fed, self.conv1d.weight.squeeze(1), self.conv1d.bias, layout, kept, silu=self.has_silu)  # B T F
        x, B, C = (fed if self.has_silu else self.act(fed)).split([self.intermediate_size, state_size, state_size], dim=-1)

        wide = torch.promote_types(hidden_states.dtype, torch.float32)
        A = -torch.exp(self._widened("A_log", wide))
        before = state.ssm.get(self.layer_idx) if state is not None else None
        if length == 1 and before is not None:
            y, after = state_update(
                before,
                x.view(batch, self.num_heads, self.head_dim),
                dt[:, 0],
                A,
                B.view(batch, self.n_groups, self.ssm_state_size),
                C.view(batch, self.n_groups, self.ssm_state_size),
                self._widened("D", wide),
                dt_bias=self._widened("dt_bias", wide),
                dt_softplus=True,
                dt_limit=self.dt_limit,
            )
        else:
            steps = time_steps(dt, self._widened("dt_bias", wide), True, self.dt_limit, wide)
            if layout.valid is not None:
                # A time step of 0 keeps the state as it is: padding must neither decay nor feed it.
                steps = steps * layout.valid[..., None]
            y, after = chunk_scan(
                x.view(batch, length, self.num_heads, self.head_dim),
                steps,
                A,
                B.view(batch, length, self.n_groups, self.ssm_state_size),
                C.view(batch, length, self.n_groups, self.ssm_state_size),
                self.chunk_size,
                D=self._widened("D", wide),
                initial_states=before,
                seq_idx=layout.seq_idx,
                return_final_states=True,
            )
        if state is not None:
            state.convolution[self.layer_idx], state.ssm[self.layer_idx] = window, after
        y, gate = (tensor.reshape(-1, self.intermediate_size) for tensor in (y, gate))
        scale, rest = self.norm.weight, self.rests.get("norm.weight")
        scale = scale if rest is None else scale.to(rest.dtype) + rest
        y = GatedNorm.apply(y, gate, scale, self.n_groups, self.norm.variance_epsilon)
        return self.out_proj(y.view(batch, length, -1).to(hidden_states.dtype))

    def _widened(self, name: str, dtype: torch.dtype) -> Tensor:
        """A_log, D or dt_bias in the dtype of the scan, with what its own dtype leaves of it."""
        value, rest = getattr(self, name).to(dtype), self.rests.get(name)
        return value if rest is None else value + rest

    @staticmethod
    def _layout_from_transformers(hidden_states: Tensor, attention_mask: Tensor | None, seq_idx: Tensor | None) -> Layout:
        batch, length, _ = hidden_states.shape
        if seq_idx is None:
            return Layout.from_mask(attention_mask, batch, length)
        if batch != 1 or seq_idx.shape != (1, length):
            raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)} for a batch of {batch} rows; expected one packed row (1, {length})")
        return Layout.packed(seq_idx[0].unique_consecutive(return_counts=True)[1].tolist(), hidden_states.device)
