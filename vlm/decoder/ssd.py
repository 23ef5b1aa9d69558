"""The state space dual (SSD) scan of Mamba-2 in plain PyTorch, and the slow recurrence it is checked against.

Mamba-2 (arXiv 2405.21060, section 6) computes h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t and y_t = C_t h_t + D x_t. `chunk_scan` has
the meaning and shapes of mamba-ssm's `mamba_chunk_scan_combined`, for any length and any device, and **resets the state where
`seq_idx` changes**, so that packed samples cannot see each other. `recurrent_scan` is the definition, written as a loop in float64.

Not here: the arithmetic over chunks and its backward pass (chunked_scan.py), the choice of a Triton kernel on a GPU (kernels.py).

Letters: B batch, T positions, H heads, P head width, G groups, N state; c chunks, L positions of a chunk; R = H / G heads per group.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .chunked_scan import ChunkedScan
from .kernels import fast_scan

__all__ = ["chunk_scan", "recurrent_scan", "state_update", "time_steps"]

SHORTEST_CHUNK, LONGEST_CHUNK = 16, 64
"""Positions. Within them the caller's chunk_size decides: shorter chunks spend their time on states, longer ones on decay matrices."""


def _check_shapes(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_states: Tensor | None,
    seq_idx: Tensor | None,
) -> None:
    if x.ndim != 4:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (B, T, H, P)")
    batch, length, heads, width = x.shape
    if dt.shape != (batch, length, heads):
        raise ValueError(f"dt has shape {tuple(dt.shape)}; expected (B, T, H) = {(batch, length, heads)}")
    if A.shape != (heads,):
        raise ValueError(f"A has shape {tuple(A.shape)}; expected (H,) = {(heads,)}")
    if B.ndim != 4 or B.shape != C.shape or B.shape[:2] != (batch, length):
        raise ValueError(
            f"B and C have shapes {tuple(B.shape)} and {tuple(C.shape)}; expected both (B, T, G, N) with B, T = {(batch, length)}"
        )
    if heads % B.shape[2]:
        raise ValueError(f"{heads} heads do not divide into {B.shape[2]} groups")
    if seq_idx is not None and seq_idx.shape != (batch, length):
        raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}; expected (B, T) = {(batch, length)}")
    expected = (batch, heads, width, B.shape[3])
    if initial_states is not None and initial_states.shape != expected:
        raise ValueError(f"initial_states has shape {tuple(initial_states.shape)}; expected (B, H, P, N) = {expected}")
    if D is not None and D.shape not in ((heads,), (heads, width)):
        raise ValueError(f"D has shape {tuple(D.shape)}; expected (H,) = {(heads,)} or (H, P) = {(heads, width)}")
    if z is not None and z.shape != x.shape:
        raise ValueError(f"z has shape {tuple(z.shape)}; expected that of x, {tuple(x.shape)}")
    if dt_bias is not None and dt_bias.shape != (heads,):
        raise ValueError(f"dt_bias has shape {tuple(dt_bias.shape)}; expected (H,) = {(heads,)}")


def time_steps(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_limit: tuple[float, float], dtype: torch.dtype) -> Tensor:
    """dt (B, T, H) or (B, H) and dt_bias (H,) -> time steps of dt's shape in `dtype`: bias, softplus and clamp, as asked for."""
    # In float64, then rounded once: the gradient of dt_bias is a sum over all positions that may nearly cancel (the worst of 200 random
    # shapes: 1.3e-5 with float32 throughout, 8e-6 so). These are H numbers a position, beside H times P of x.
    dt = dt.double()
    if dt_bias is not None:
        dt = dt + dt_bias.double()
    if dt_softplus:
        dt = F.softplus(dt)
    if not dt_softplus or dt_limit[0] > 0.0 or dt_limit[1] < float("inf"):  # softplus alone is within (0, inf)
        dt = dt.clamp(min=dt_limit[0], max=dt_limit[1])
    return dt.to(dtype)


def chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Chunked SSD scan (Mamba-2, section 6), differentiable.

    x (B, T, H, P), dt (B, T, H), A (H,) negative, B and C (B, T, G, N), D (H,) or (H, P), z (B, T, H, P): the result is multiplied by
    silu(z). seq_idx (B, T) integers, non-decreasing: the state starts from zero where it changes; `initial_states` (B, H, P, N) belong
    to the first segment. `dt_limit` clamps after softplus. `chunk_size` is a hint and does not change the result. All sums are made in
    float32 (float64 when x is).

    Returns y (B, T, H, P) in x's dtype and, if asked, the state after the last position (B, H, P, N) in float32 (float64 when x is).
    Raises ValueError when shapes do not fit.
    """
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    if chunk_size < 1:
        raise ValueError(f"{chunk_size = }; expected at least 1")
    batch, length, heads, width = x.shape
    state = B.shape[3]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if length == 0:
        final = (
            torch.zeros(batch, heads, width, state, dtype=dtype, device=x.device) if initial_states is None else initial_states.to(dtype)
        )
        return (x, final) if return_final_states else x

    kernel = fast_scan(x.device, x.dtype) or plain_scan
    settings = {"dt_softplus": dt_softplus, "dt_limit": dt_limit, "return_final_states": return_final_states}
    return kernel(x, dt, A, B, C, chunk_size, D=D, z=z, dt_bias=dt_bias, initial_states=initial_states, seq_idx=seq_idx, **settings)


def plain_scan(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, dt_softplus=False,
    dt_limit=(0.0, float("inf")), return_final_states=False,
):  # fmt: skip
    """`chunk_scan` in plain PyTorch, on any device; arguments are not checked again."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    steps = time_steps(dt, dt_bias, dt_softplus, dt_limit, dtype)  # B T H
    span = min(max(chunk_size, SHORTEST_CHUNK), LONGEST_CHUNK, x.shape[1])
    before = None if initial_states is None else initial_states.to(dtype)
    inputs = (x, steps, A.to(dtype), B, C, None if D is None else D.to(dtype), before)
    # Inside the Function nobody can tell: there gradients are off, and inputs say only that they could have one.
    keep = torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    y, current = ChunkedScan.apply(*inputs, seq_idx, span, keep)
    if z is not None:
        y = (y.to(dtype) * F.silu(z.to(dtype))).to(x.dtype)
    return (y, current) if return_final_states else y


def recurrent_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:
    """The definition of the scan, position by position in float64: the reference. Arguments as `chunk_scan`.

    Returns y (B, T, H, P) and the final state (B, H, P, N), both float64.
    """
    _check_shapes(x, dt, A, B, C, D, z, dt_bias, initial_states, seq_idx)
    batch, length, heads, width = x.shape
    repeats = heads // B.shape[2]
    x64, A64 = x.double(), A.double()
    B64, C64 = (tensor.double().repeat_interleave(repeats, dim=2) for tensor in (B, C))  # B T H N
    steps = time_steps(dt, dt_bias, dt_softplus, dt_limit, torch.float64)
    decay = (steps * A64).exp()
    if seq_idx is not None:
        decay = decay * F.pad(seq_idx[:, 1:] == seq_idx[:, :-1], (1, 0), value=True)[..., None]
    state = x64.new_zeros(batch, heads, width, B.shape[3]) if initial_states is None else initial_states.double()
    outputs = []
    for left, fed, B_t, C_t in zip(*(tensor.unbind(1) for tensor in (decay, steps[..., None] * x64, B64, C64)), strict=True):
        state = left[..., None, None] * state + fed[..., None] * B_t[:, :, None, :]  # B H P N
        outputs.append((state * C_t[:, :, None, :]).sum(-1))
    y = torch.stack(outputs, dim=1) if outputs else x64
    if D is not None:
        y = y + x64 * (D.double()[:, None] if D.ndim == 1 else D.double())
    if z is not None:
        y = y * F.silu(z.double())
    return y, state


def state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
) -> tuple[Tensor, Tensor]:
    """One position of the recurrence for decoding.

    state (B, H, P, N) float32, x (B, H, P), dt (B, H), A (H,), B and C (B, G, N), D (H,). Returns y (B, H, P) in x's dtype and the new
    state (B, H, P, N); `state` is not changed.
    """
    dtype = state.dtype
    groups = B.shape[1]
    steps = time_steps(dt, dt_bias, dt_softplus, dt_limit, dtype)  # B H
    state = rearrange(state * (steps * A.to(dtype)).exp()[..., None, None], "b (g r) p n -> b g r p n", g=groups)
    fed = rearrange(x.to(dtype) * steps[..., None], "b (g r) p -> b g r p 1", g=groups)
    state = state + fed * B.to(dtype)[:, :, None, None, :]
    y = (state @ C.to(dtype)[:, :, None, :, None]).squeeze(-1)  # B G R P
    y = rearrange(y, "b g r p -> b (g r) p")
    if D is not None:
        y = y + x.to(dtype) * D.to(dtype)[:, None]
    return y.to(x.dtype), rearrange(state, "b g r p n -> b (g r) p n")
