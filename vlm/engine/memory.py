"""How much memory generation state takes, from the configuration alone, and how much of it there is to give.

A hybrid decoder's cost of a sequence is a constant (windows and states of the Mamba layers) and a small part that grows with the text (keys
and values of the few attention layers). Both are known before anything is computed, so a request waits instead of failing half-way.
"""

from dataclasses import dataclass

import torch
from transformers import NemotronHConfig

from ..decoder.tails import pay_off, tail_elements

__all__ = ["StateCost", "default_budget_bytes", "rounded_span"]

SPAN_STEP = 64  # spans of the buffers are multiples of it
FREE_SHARE = 0.25  # of free memory that state may take when nobody says


def _dtype_bytes(dtype: torch.dtype) -> int:
    return torch.empty((), dtype=dtype).element_size()


@dataclass(frozen=True)
class StateCost:
    """row_bytes: of any sequence; token_bytes: of each slot for a token."""

    row_bytes: int
    token_bytes: int

    @classmethod
    def of(cls, config: NemotronHConfig, dtype: torch.dtype, *, with_tails: bool = False) -> "StateCost":
        """For a decoder of this configuration whose weights have this dtype; `with_tails` as for `Slots`."""
        size, wide = _dtype_bytes(dtype), max(_dtype_bytes(dtype), 4)
        inner = config.mamba_num_heads * config.mamba_head_dim
        window = (config.conv_kernel - 1) * (inner + 2 * config.n_groups * config.ssm_state_size) * size
        mamba = sum(kind in ("mamba", "linear_attention") for kind in config.layers_block_type)
        attention = sum(kind in ("attention", "full_attention") for kind in config.layers_block_type)
        state, tail = inner * config.ssm_state_size * wide, 0
        if with_tails and pay_off(state):
            tail = wide * tail_elements(config.mamba_num_heads, config.mamba_head_dim, config.n_groups, config.ssm_state_size)
        return cls(
            mamba * (window + state + tail),
            attention * 2 * config.num_key_value_heads * config.head_dim * size,
        )

    def bytes(self, rows: int, span: int) -> int:
        """Of buffers for `rows` sequences of `span` tokens each."""
        return rows * (self.row_bytes + self.token_bytes * span)


def rounded_span(tokens: int) -> int:
    """Slots of a buffer in which `tokens` fit."""
    return -(-tokens // SPAN_STEP) * SPAN_STEP


def default_budget_bytes(device: torch.device) -> int:
    """A quarter of the memory that is free on the device now."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0] * FREE_SHARE)
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            available = next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        available = 4 * 2**30  # not Linux: a modest guess; give the engine a figure of your own
    return int(available * FREE_SHARE)
