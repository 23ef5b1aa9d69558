"""Which code computes the scan on a device: the one place that chooses, and the probe that an installed kernel has to pass first.

Plain PyTorch is always there and always right. mamba-ssm's Triton kernels are many times faster on a GPU, but releases of them have
differed in what they do with `seq_idx`, and a kernel that lets a state leak between packed samples fails silently. So the installed one
is compared with the float64 recurrence, once a process, device and dtype, before it is used at all; what differs or raises is not used, and
`describe` says so. float32 stays with plain PyTorch: who computes in float32 wants its digits, and the kernels multiply in TF32.

Not here: the arithmetic (ssd.py and what it calls).
"""

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from .float32_digits import float32_digits

__all__ = ["choice", "describe", "fast_scan", "probe"]

INSTALL = "pip install 'nemotron-h-vision[cuda]'"
LIMITS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-2}
"""Largest error allowed, relative to the largest value: rounding of the dtype; a forgotten border is wrong by ten percents at least."""

HALVES = (torch.bfloat16, torch.float16)
Finding = tuple[str, str, bool]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _triton(x, dt, A, B, C, chunk_size, *, seq_idx=None, **settings):
    """mamba-ssm's kernel with the meaning of `chunk_scan`."""
    kernel = importlib.import_module("mamba_ssm.ops.triton.ssd_combined").mamba_chunk_scan_combined
    if seq_idx is not None:
        # The kernels take 0 for the segment that the initial states belong to.
        seq_idx = (seq_idx - seq_idx[:, :1]).to(torch.int32).contiguous()
    span = min(max(16, 1 << (chunk_size - 1).bit_length()), 256)  # powers of two only
    x, B, C = (tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in (x, B, C))
    return kernel(x, dt, A, B, C, span, seq_idx=seq_idx, **settings)


def _cases() -> dict[str, dict]:
    """What is probed: name -> length in positions, whether there are borders and an initial state."""
    return {
        "forward": {"length": 192},
        "odd length": {"length": 77},
        "initial state": {"length": 130, "initial": True},
        "seq_idx": {"length": 201, "borders": (1, 2, 63, 64, 100, 180)},
        "seq_idx and initial state": {"length": 150, "borders": (70, 128), "initial": True},
    }


def _inputs(length: int, device, dtype: torch.dtype, borders: tuple[int, ...] = (), initial: bool = False) -> dict[str, Tensor]:
    """Arguments of a scan of 4 heads of 64 in 2 groups with a state of 128, the published models' sizes: others would be other kernels.
    Weakly decaying, so that what leaks is seen far away."""
    generator = torch.Generator().manual_seed(length)
    heads, width, groups, size = 4, 64, 2, 128

    def draw(*shape, to=dtype):
        return torch.randn(*shape, generator=generator).to(device, to)

    inputs = {
        "x": draw(1, length, heads, width),
        "dt": draw(1, length, heads),
        "A": -0.1 - 0.5 * draw(heads, to=torch.float32).abs(),
        "B": draw(1, length, groups, size),
        "C": draw(1, length, groups, size),
        "D": draw(heads, to=torch.float32),
        "dt_bias": draw(heads, to=torch.float32) - 3.0,
    }
    if initial:
        inputs["initial_states"] = draw(1, heads, width, size, to=torch.float32)
    if borders:
        starts = torch.zeros(1, length, dtype=torch.int32)
        starts[0, list(borders)] = 1
        inputs["seq_idx"] = starts.cumsum(1, dtype=torch.int32).to(device)
    return inputs


def _error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest value; infinite if there is none or a NaN."""
    error = (found.detach().double() - expected.detach()).abs().max() / expected.detach().abs().max().clamp(min=1e-6)
    return error.item() if torch.isfinite(error) else float("inf")


def _compare(scan: Callable, case: dict, device, dtype: torch.dtype) -> tuple[float, float]:
    """Largest relative error of values (y and final state), and of the gradients of all inputs."""
    from .ssd import recurrent_scan  # there `fast_scan` is imported from here

    inputs = _inputs(device=device, dtype=dtype, **case)
    given = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items() if tensor.is_floating_point()}
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in given.items()}
    borders = {"seq_idx": inputs["seq_idx"]} if "seq_idx" in inputs else {}
    expected = recurrent_scan(**exact, **borders, dt_softplus=True)
    found = scan(**given, **borders, chunk_size=128, dt_softplus=True, return_final_states=True)
    values = max(_error(a, b) for a, b in zip(found, expected, strict=True))
    weights = [torch.randn(part.shape, generator=torch.Generator().manual_seed(1)).to(device) for part in expected]
    torch.autograd.backward(expected, [weight.double() for weight in weights])
    torch.autograd.backward(found, [weight.to(part.dtype) for weight, part in zip(weights, found, strict=True)])
    return values, max(_error(given[name].grad, exact[name].grad) for name in given)


@contextmanager
def _undisturbed(device: torch.device) -> Iterator[None]:
    """The first call may come from anywhere: generation without gradients, a step under autocast, a block that activation checkpointing
    runs, whose hooks would answer the probe's backward pass by running the block, and with it the probe, again."""
    with (
        float32_digits(),
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast(device.type, enabled=False),
        torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor),
    ):
        yield


def findings(scan: Callable, device, dtype: torch.dtype) -> list[Finding]:
    """Compare any function with the arguments of `chunk_scan` to the recurrence; (what, figure, whether it holds) for each case."""
    limit, result = LIMITS[dtype], []
    for name, case in _cases().items():
        try:
            with _undisturbed(device):
                errors = _compare(scan, case, device, dtype)
        except Exception as error:  # a kernel may fail in any way: to compile, to launch, to accept the shape
            result.append((name, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160], False))
            continue
        for what, found in zip((name, f"{name}, gradients"), errors, strict=True):
            result.append((what, f"{found:.1e} from float64 ({_name(dtype)}, at most {limit:.0e})", found <= limit))
    return result


@cache
def _triton_findings(device: torch.device, dtype: torch.dtype) -> tuple[Finding, ...]:
    return tuple(findings(_triton, device, dtype))


@cache
def _import_error() -> str | None:
    """Why mamba-ssm's kernels cannot be imported, or None; asked once, for an import that failed is tried anew each time."""
    try:
        importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    except Exception as error:  # built for another torch or CUDA, it may fail in any way
        return str(error).splitlines()[0] if str(error) else type(error).__name__
    return None


def _missing(device: torch.device) -> str | None:
    """Why there is no kernel to try, or None."""
    if device.type != "cuda":
        return f"no Triton kernels for {device.type}"
    error = _import_error()
    return None if error is None else f"mamba-ssm cannot be imported ({error}); for its Triton kernels: {INSTALL}"


def choice(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> str:
    """What computes half-precision scans on this device: "triton" or "torch". The first call for a device and dtype runs the probe."""
    device = torch.device(device)
    return "triton" if _missing(device) is None and all(ok for _, _, ok in _triton_findings(device, dtype)) else "torch"


def fast_scan(device: torch.device, dtype: torch.dtype) -> Callable | None:
    """The kernel to use instead of plain PyTorch for x of this dtype; None where plain PyTorch is to be used."""
    if device.type != "cuda" or dtype not in HALVES:
        return None
    return _triton if choice(device, dtype) == "triton" else None


def describe(device: torch.device | str) -> str:
    """One line: which path runs on this device, and why."""
    device = torch.device(device)
    reason = _missing(device)
    if reason is not None:
        return f"plain PyTorch: {reason}"
    failed = {dtype: [name for name, _, ok in _triton_findings(device, dtype) if not ok] for dtype in HALVES}
    fit = [_name(dtype) for dtype in HALVES if not failed[dtype]]
    unfit = "; ".join(f"{_name(dtype)}: {', '.join(names)}" for dtype, names in failed.items() if names)
    said = f"; the installed mamba-ssm fails its probe ({unfit})" if unfit else ""
    return f"mamba-ssm's Triton kernels for {' and '.join(fit)}, plain PyTorch for the rest{said}" if fit else f"plain PyTorch{said}"


def probe(device: torch.device | str) -> list[Finding]:
    """(what was compared, figure, whether it holds): the plain path, then an installed kernel, each against the float64 recurrence."""
    from .ssd import plain_scan

    device = torch.device(device)
    result = [(f"plain PyTorch, {name}", figure, ok) for name, figure, ok in findings(plain_scan, device, torch.float32)]
    if _missing(device) is None:
        result += [(f"mamba-ssm, {name}", figure, ok) for dtype in HALVES for name, figure, ok in _triton_findings(device, dtype)]
    return result
