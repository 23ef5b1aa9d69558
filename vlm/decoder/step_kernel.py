"""Which code makes one step of the recurrence on a GPU: an installed kernel that passed its probe, or plain PyTorch.

`scan_step` passes over the states three times; mamba-ssm's `selective_state_update` does so once, and states are most of what a
decoding step moves. It adds in float32 whatever the model's dtype, as `scan_step` does. As with the scan (kernels.py), an installed kernel
is compared with float64 before it is used at all.

Letters: R rows, H heads, P head width, G groups, N state.
"""

import importlib
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from .kernels import Finding
from .short_scan import scan_step

__all__ = ["fast_step", "step_findings", "step_probe"]

MODULE = "mamba_ssm.ops.triton.selective_state_update"
LIMIT = 1e-5  # of the largest value


def _triton_step(x: Tensor, steps: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, states: Tensor) -> Tensor:
    """mamba-ssm's kernel with the meaning of `scan_step`. It knows by strides that a head's channels share steps, A, D and the steps' bias,
    which it asks for even where there is none."""
    kernel = importlib.import_module(MODULE).selective_state_update
    width, size = x.shape[-1], B.shape[-1]
    decays, nothing = A[:, None, None].expand(-1, width, size), torch.zeros_like(A)[:, None].expand(-1, width)
    return kernel(states, x, steps[..., None].expand(-1, -1, width), decays, B, C, D=D[:, None].expand(-1, width), dt_bias=nothing)


def step_findings(step: Callable, device) -> list[Finding]:
    """Compare a function with the arguments of `scan_step` to it in float64, three tokens long: (what, figure, whether it holds)."""
    rows, heads, width, groups, size = 3, 4, 64, 2, 128  # the published models' sizes
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    A, D, states = -0.1 - draw(heads).abs(), draw(heads), draw(rows + 1, heads, width, size)
    mine, exact = states.to(device), states.double()
    result = []
    try:
        errors = []
        for _ in range(3):
            x, steps, B, C = draw(rows, heads, width), draw(rows, heads).abs(), draw(rows, groups, size), draw(rows, groups, size)
            found = step(*(part.to(device) for part in (x, steps, A, B, C, D)), mine[:rows])
            expected = scan_step(*(part.double() for part in (x, steps, A, B, C, D)), exact[:rows])
            errors.append(_error(found, expected))
        for what, error in (("a step", max(errors)), ("a step's states", _error(mine, exact))):
            result.append((what, f"{error:.1e} from float64 (float32, at most {LIMIT:.0e})", error <= LIMIT))
    except Exception as error:  # a kernel may fail in any way: to compile, to launch, to accept the shape
        result.append(("a step", f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160], False))
    return result


def _error(found: Tensor, expected: Tensor) -> float:
    error = (found.double().cpu() - expected).abs().max() / expected.abs().max()
    return error.item() if torch.isfinite(error) else float("inf")


@cache
def _findings(device: torch.device) -> tuple[Finding, ...]:
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        return tuple(step_findings(_triton_step, device))


@cache
def _is_installed() -> bool:
    try:
        importlib.import_module(MODULE)
    except Exception:  # built for another torch or CUDA, it may fail in any way
        return False
    return True


def fast_step(device: torch.device) -> Callable | None:
    """The kernel to use instead of `scan_step` for float32 states; None where plain PyTorch is to be used. The first call for a device runs
    the probe."""
    if device.type != "cuda" or not _is_installed():
        return None
    return _triton_step if all(ok for _, _, ok in _findings(device)) else None


def step_probe(device: torch.device | str) -> list[Finding]:
    """(what was compared, figure, whether it holds): the plain step, then an installed kernel, each against float64."""
    device = torch.device(device)
    result = [(f"plain PyTorch, {name}", figure, ok) for name, figure, ok in step_findings(scan_step, device)]
    if device.type == "cuda" and _is_installed():
        result += [(f"mamba-ssm, {name}", figure, ok) for name, figure, ok in _findings(device)]
    return result
