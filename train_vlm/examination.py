"""Look at one pass of the model for the first value that is not finite: which module made it, from what, and how the scan's inputs lay.

Modules report as they finish, so that the innermost one that made a bad value comes before those around it; gradients report in the
order in which they flow back. The time steps dt and the rates A of each Mamba layer go along: dt A is where a state space model goes wrong
first.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlm.decoder.mixer import Mamba2Mixer

__all__ = ["Findings", "bad_parameters", "watch"]


def _tensors(value) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors(item)


def _describe(value) -> dict | None:
    """Counts and range of the tensors in a value; None when all of them are finite."""
    tensors = [tensor.detach() for tensor in _tensors(value) if tensor.is_floating_point() and tensor.numel()]
    if all(bool(tensor.isfinite().all()) for tensor in tensors):
        return None
    finite = torch.cat([tensor.float().flatten() for tensor in tensors])
    kept = finite[finite.isfinite()]
    return {
        "shapes": [list(tensor.shape) for tensor in tensors],
        "nan": int(finite.isnan().sum()),
        "infinite": int(finite.isinf().sum()),
        "largest_finite": float(kept.abs().max()) if len(kept) else None,
    }


def _range(tensor: Tensor) -> list[float]:
    return [float(tensor.min()), float(tensor.max())] if tensor.numel() else []


class Findings:
    """first_forward and first_gradient: {"module", "kind", "nan", "infinite", ...} or None; scan: {layer: {"dt": [min, max], "A": [min,
    max]}}."""

    def __init__(self):
        self.first_forward: dict | None = None
        self.first_gradient: dict | None = None
        self.scan: dict[str, dict] = {}
        self.outputs: list[Tensor] = []  # what gradients flow back through, in the order of the pass

    def to_dict(self) -> dict:
        return {"first_forward": self.first_forward, "first_gradient": self.first_gradient, "scan": self.scan}


@contextmanager
def watch(model: nn.Module) -> Iterator[Findings]:
    """Within the block, every pass through `model` is looked at. Works on a sharded model too: it sees what modules see."""
    findings, handles, last = Findings(), [], {}

    def finished(name: str, module: nn.Module, inputs, keywords, output) -> None:
        if findings.first_forward is None and (bad := _describe(output)):
            before = _describe([inputs, keywords])
            findings.first_forward = {"module": name, "kind": type(module).__name__, "inputs_finite": before is None, **bad}
        for tensor in _tensors(output):
            if tensor.requires_grad:
                findings.outputs.append(tensor)
                tensor.register_hook(lambda gradient: flowed(name, module, gradient))

    def flowed(name: str, module: nn.Module, gradient: Tensor) -> None:
        if findings.first_gradient is None and (bad := _describe(gradient)):
            findings.first_gradient = {"module": name, "kind": type(module).__name__, "before": last.get("module"), **bad}
        last["module"] = name

    def begun(name: str, mixer: Mamba2Mixer) -> None:
        rates = -torch.exp(mixer.A_log.detach().float())
        findings.scan[name] = {"A": _range(rates), "dt": []}
        last[name] = mixer.dt_bias.detach().float().clone()

    def projected(name: str, mixer: Mamba2Mixer, output: Tensor) -> None:
        steps = F.softplus(output.detach()[..., -mixer.num_heads :].float() + last[name])
        findings.scan[name]["dt"] = _range(steps.clamp(*mixer.dt_limit))

    for name, module in model.named_modules():
        if isinstance(module, Mamba2Mixer):
            handles.append(module.register_forward_pre_hook(lambda module, inputs, name=name: begun(name, module)))
            handles.append(module.in_proj.register_forward_hook(
                lambda _, inputs, output, name=name, mixer=module: projected(name, mixer, output)))  # fmt: skip
        handles.append(module.register_forward_hook(
            lambda module, inputs, keywords, output, name=name: finished(name or "model", module, inputs, keywords, output),
            with_kwargs=True))  # fmt: skip
    try:
        yield findings
    finally:
        findings.outputs.clear()
        for handle in handles:
            handle.remove()


def bad_parameters(model: nn.Module) -> dict[str, list[str]]:
    """Names of weights, and of gradients of weights, that are not finite."""
    named = dict(model.named_parameters())
    return {
        "weights": [name for name, p in named.items() if not bool(p.detach().isfinite().all())],
        "gradients": [name for name, p in named.items() if p.grad is not None and not bool(p.grad.isfinite().all())],
    }
