"""Checks of what is installed, and of the decoder's operations one by one, against their definitions in float64.

Letters: B batch, T positions, H heads, P head width, G groups, N state.
"""

import importlib
import importlib.metadata
import platform
from collections.abc import Iterator

import torch

from ..decoder.convolution import causal_convolution
from ..decoder.layout import Layout
from ..decoder.ssd import chunk_scan, recurrent_scan, state_update
from ..decoder.step_kernel import step_probe
from .check import Check, measured

__all__ = ["convolution", "installed", "kernels", "scan"]

PACKAGES = ("torch", "transformers", "safetensors")
KERNEL_PACKAGES = ("mamba-ssm", "causal-conv1d", "flash-attn")
# Sums in float32 whatever x is; the result is rounded to x's dtype.
SCAN_BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def installed(device: torch.device) -> Iterator[Check]:
    """Versions and kernels found; nothing here can fail."""
    yield Check("versions", ", ".join([f"Python {platform.python_version()}", *(f"{name} {_version(name)}" for name in PACKAGES)]), True)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    yield Check("device", f"{device} ({name})", True)
    yield Check("kernel packages", ", ".join(f"{name} {_version(name)}" for name in KERNEL_PACKAGES), True)


def kernels(device: torch.device) -> Iterator[Check]:
    """Which path the scan takes here, and what its probe found."""
    try:
        module = importlib.import_module("vlm.decoder.kernels")
    except ModuleNotFoundError as error:
        if error.name != "vlm.decoder.kernels":
            raise
        yield Check("scan path", "plain PyTorch", True)
        return
    yield Check("scan path", module.describe(device), True)
    for name, figure, ok in [*module.probe(device), *step_probe(device)]:
        yield Check(f"probe: {name}", str(figure), bool(ok))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    found, expected = found.detach(), expected.detach()
    difference = (found.double() - expected.double()).abs().max()
    return float(difference / expected.double().abs().max().clamp_min(1e-30)) if difference.isfinite() else float("inf")


def scan(config, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """chunk_scan at the model's head width, groups and state, against the recurrence in float64: borders anywhere, more than a chunk."""
    groups, width, state = config.n_groups, config.mamba_head_dim, config.ssm_state_size
    heads = groups * min(config.mamba_num_heads // groups, 2)
    length = config.chunk_size + 5
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator).to(device)

    def inputs():
        x, B, C = draw(1, length, heads, width), draw(1, length, groups, state), draw(1, length, groups, state)
        dt, A, D = 0.1 * draw(1, length, heads).abs(), -0.1 - draw(heads).abs(), draw(heads)
        return [x.to(dtype), dt, A, B.to(dtype), C.to(dtype), D]

    borders = torch.tensor([0, length // 3, length // 3 + 1, 2 * length // 3], device=device)
    seq_idx = (torch.arange(length, device=device)[:, None] >= borders).sum(-1).int()[None] - 1
    bound = SCAN_BOUNDS[dtype]
    for name, packed in (("chunk_scan = recurrence", None), ("chunk_scan = recurrence, packed", seq_idx)):
        x, dt, A, B, C, D = (tensor.requires_grad_() for tensor in inputs())
        before = draw(1, heads, width, state) if packed is None else None
        y, final = chunk_scan(x, dt, A, B, C, config.chunk_size, D=D, initial_states=before, seq_idx=packed, return_final_states=True)
        expected, expected_final = recurrent_scan(x, dt, A, B, C, D=D, initial_states=before, seq_idx=packed)
        yield measured(name, max(_relative(y, expected), _relative(final, expected_final)), bound)
        weights = draw(*y.shape)
        leaves = (x, dt, A, B, C, D)
        found = torch.autograd.grad((y.double() * weights).sum(), leaves)
        wanted = torch.autograd.grad((expected * weights).sum(), leaves)
        worst = max(_relative(one, other) for one, other in zip(found, wanted, strict=True))
        yield measured(f"{name}, gradients", worst, 10 * bound)
    with torch.no_grad():
        x, dt, A, B, C, D = inputs()
        before = draw(1, heads, width, state).to(torch.promote_types(dtype, torch.float32))
        y, after = state_update(before, x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D)
        expected, expected_final = recurrent_scan(x[:, :1], dt[:, :1], A, B[:, :1], C[:, :1], D=D, initial_states=before)
        yield measured("one decoding step = recurrence", max(_relative(y, expected[:, 0]), _relative(after, expected_final)), bound)


@torch.no_grad()
def convolution(config, device: torch.device, dtype: torch.dtype) -> Iterator[Check]:
    """The short convolution over a pack, against each sequence alone, taps summed one by one in float64."""
    taps, channels, lengths = config.conv_kernel, 16, (5, 1, config.conv_kernel, 9)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, sum(lengths), channels, generator=generator).to(device, dtype)
    weight, bias = (torch.randn(*shape, generator=generator).to(device, dtype) for shape in ((channels, taps), (channels,)))
    found, _ = causal_convolution(x, weight, bias, Layout.packed(lengths, device))
    expected = torch.zeros(1, sum(lengths), channels, dtype=torch.float64, device=device)
    start = 0
    for length in lengths:
        for t in range(length):
            expected[0, start + t] = bias.double()
            for back in range(min(taps, t + 1)):
                expected[0, start + t] += weight[:, taps - 1 - back].double() * x[0, start + t - back].double()
        start += length
    yield measured("convolution of a pack = of each alone", _relative(found, expected), SCAN_BOUNDS[dtype])
