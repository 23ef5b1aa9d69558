"""What benchmarks/scan.py measures: inputs of a scan at the shape of a real layer, the two ways to compute it, and its cost.

The baseline is `mamba2_chunk_scan` of the installed transformers, not patched: what its Nemotron-H mixer runs when mamba-ssm is not
installed. Both ways get the same tensors. Decays are those of Mamba-2 at initialisation (A in [-16, -1], time steps in [0.001, 0.1]).
"""

import importlib
import math
import resource
import time

import torch
from torch import Tensor

from vlm.decoder.ssd import chunk_scan, recurrent_scan

SHAPES = {
    "8b": {"heads": 128, "width": 64, "groups": 8, "state": 128, "chunk": 128},
    "tiny": {"heads": 8, "width": 32, "groups": 1, "state": 32, "chunk": 32},
}


def inputs(shape: str, length: int, dtype: torch.dtype, heads: int | None = None) -> dict[str, Tensor]:
    """x (1, T, H, P), dt (1, T, H), B and C (1, T, G, N) of this dtype; A, D, dt_bias (H,) float32. `heads`: of one group only."""
    sizes = SHAPES[shape]
    groups = 1 if heads else sizes["groups"]
    heads = heads or sizes["heads"]
    generator = torch.Generator().manual_seed(0)

    def normal(*extents):
        return torch.randn(*extents, generator=generator)

    steps = torch.exp(torch.rand(heads, generator=generator) * math.log(100) + math.log(0.001))
    made = {
        "x": normal(1, length, heads, sizes["width"]).to(dtype),
        "dt": normal(1, length, heads).mul_(0.5).to(dtype),
        "A": -1.0 - 15.0 * torch.rand(heads, generator=generator),
        "B": normal(1, length, groups, sizes["state"]).to(dtype),
        "C": normal(1, length, groups, sizes["state"]).to(dtype),
        "D": torch.ones(heads),
        "dt_bias": steps + torch.log(-torch.expm1(-steps)),  # softplus of it is the step
    }
    return {name: tensor.requires_grad_() for name, tensor in made.items()}


def baseline():
    return importlib.import_module("transformers.models.nemotron_h.modeling_nemotron_h").mamba2_chunk_scan


def way_of(name: str, shape: str):
    function = chunk_scan if name == "ours" else baseline()
    chunk = SHAPES[shape]["chunk"]

    def scan(x, dt, A, B, C, D, dt_bias):
        return function(x, dt, A, B, C, chunk_size=chunk, D=D, dt_bias=dt_bias, dt_softplus=True)

    return scan


def run(scan, tensors: dict[str, Tensor], weights: Tensor, backward: bool) -> float:
    """Seconds of one pass."""
    started = time.perf_counter()
    if backward:
        y = scan(**tensors)
        torch.autograd.grad(y, list(tensors.values()), weights.to(y.dtype))
    else:
        with torch.no_grad():
            scan(**tensors)
    return time.perf_counter() - started


def times(shape: str, length: int, dtype: torch.dtype, ways: list[str], seconds: float) -> dict:
    """Milliseconds of each way, forward and with backward: the fastest of passes taken in turn, for `seconds`, three times at least
    (twice from 8,192 positions on, where a pass of the fallback takes most of a minute).

    The fastest, because whatever else runs on the machine only adds.
    """
    tensors = inputs(shape, length, dtype)
    weights = torch.randn(tensors["x"].shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    taken: dict = {way: {"forward": [], "both": []} for way in ways}
    started = time.perf_counter()
    least = 3 if length < 8192 else 2
    while time.perf_counter() - started < seconds or len(taken[ways[0]]["both"]) < least:
        for way in ways:
            for kind, backward in (("forward", False), ("both", True)):
                taken[way][kind].append(run(way_of(way, shape), tensors, weights, backward))
    return {way: {kind: min(values) * 1e3 for kind, values in kinds.items()} for way, kinds in taken.items()}


def memory(shape: str, length: int, dtype: torch.dtype, way: str, backward: bool) -> dict:
    """Peak of this process above inputs and libraries, in bytes. For a process of its own: a peak is never forgotten."""
    scan = way_of(way, shape)
    short = inputs(shape, 8, dtype)
    run(scan, short, torch.ones_like(short["x"]), True)
    tensors = inputs(shape, length, dtype)
    weights = torch.ones_like(tensors["x"])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    run(scan, tensors, weights, backward)
    return {"bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before}


def errors(shape: str, length: int, dtype: torch.dtype) -> dict:
    """Of both ways against the float64 recurrence on the same inputs, one group of heads: largest difference over largest value, of y and
    of the worst gradient."""
    tensors = inputs(shape, length, dtype, heads=SHAPES[shape]["heads"] // SHAPES[shape]["groups"])
    exact = {name: tensor.detach().double().requires_grad_() for name, tensor in tensors.items()}
    expected, _ = recurrent_scan(**exact, dt_softplus=True)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(expected, list(exact.values()), weights.double())

    def relative(found: Tensor, true: Tensor) -> float:
        return ((found.double() - true).abs().max() / true.abs().max()).item()

    result = {}
    for way in ("ours", "transformers"):
        y = way_of(way, shape)(**tensors)
        found = torch.autograd.grad(y, list(tensors.values()), weights.to(y.dtype))
        each = {name: relative(a, b) for name, a, b in zip(tensors, found, gradients, strict=True)}
        worst = max(each, key=each.get)
        result[way] = {"y": relative(y.detach(), expected.detach()), "gradient": each[worst], "of": worst}
    return result
