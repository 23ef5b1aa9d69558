"""What does FP8 cost each layer, and is it too much? Measured against the same products in the model's own precision (BF16) while a step
is made, at the first step and every so many; a layer that loses too much is put back.

One scale for a whole tensor fails in one way: an outlier stretches it until everything else is rounded to zero. The norm of the error does
not see that - the outlier, which is right, dominates signal and noise alike. So noise is taken as a share of the signal for each row and
each column of a product and averaged over them, each share at most 1: outputs that are lost count as lost, however small. Rows of the
input's gradient are left out: tokens far from any answer have next to none. Every rank adds its sums, so that all decide the same.

Measuring changes nothing but the layers it puts back: the step's own numbers are made as always.

Letters: T rows (tokens), K inputs, N outputs of a layer.
"""

import math
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_vlm.fp8_section import Fp8
from train_vlm.ranks import sum_over_ranks
from vlm.fp8 import Fp8Report, convert_to_fp8, has_fp8_units

__all__ = ["PRODUCTS", "Fp8Guard", "noise_shares", "start_fp8"]

PRODUCTS = ("output", "gradient of its input", "gradient of its weights")
DIRECTIONS = {"output": (0, 1), "gradient of its input": (0,), "gradient of its weights": (0, 1)}
"""Dimensions summed over: 1 gives a share for each row, 0 for each column."""
MOST_DB = 120.0


def noise_shares(reference: Tensor, found: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """(rows, columns), both -> the sum over rows (dim 1) or columns (dim 0) of noise power / signal power, each at most 1, and how many
    there are, as float64 scalars. Those without any signal are left out; what is not finite counts as lost."""
    wide = reference.float()
    signal, noise = wide.square().sum(dim), (found.float() - wide).square().sum(dim)
    shares = torch.nan_to_num((noise / signal).clamp(max=1.0), nan=1.0)[signal != 0]
    return shares.sum(dtype=torch.float64), torch.tensor(len(shares), dtype=torch.float64, device=shares.device)


@dataclass(frozen=True)
class _Finding:
    """Of one layer: dB of each product (None: not made, such as gradients of frozen weights)."""

    decibels: dict[str, float | None]

    @property
    def worst(self) -> tuple[float, str]:
        return min(((value, product) for product, value in self.decibels.items() if value is not None), default=(MOST_DB, PRODUCTS[0]))


class _Heard(torch.autograd.Function):
    """apply(output, rows, hear) -> output; in the backward pass hear(rows, its gradient). The rows are saved as autograd saves, so that
    activation checkpointing drops them and makes them again: held in a hook, those of every layer would stand in memory at once."""

    @staticmethod
    def forward(ctx, output, rows, hear):
        ctx.save_for_backward(rows)
        ctx.hear = hear
        return output.view_as(output)

    @staticmethod
    def backward(ctx, gradient):
        ctx.hear(*ctx.saved_tensors, gradient)
        return gradient, None, None


class Fp8Guard:
    """`begin` before a step, `end` after it, with the step's number from 1; both on every rank. `put_back`: names of layers that went back,
    in order; give them to `restore` when a run goes on."""

    def __init__(self, report: Fp8Report, settings: Fp8):
        self.report, self.settings = report, settings
        self.put_back: list[str] = []
        self.last: dict[str, _Finding] = {}
        self._sums: dict[tuple[str, str, int], list[Tensor]] | None = None
        self._calls: dict[str, int] = {}

    @property
    def active(self) -> dict[str, nn.Module]:
        """The layers that multiply in FP8 now."""
        return {name: layer for name, layer in self.report.layers.items() if layer.uses_fp8}

    def restore(self, names: list[str]) -> None:
        """Put back the layers that an earlier start of this run put back."""
        for name in names:
            self._put_back(name)

    def _put_back(self, name: str) -> None:
        self.report.layers[name].uses_fp8 = False
        self.put_back.append(name)

    def is_due(self, step: int) -> bool:
        every = self.settings.guard_every
        return every is not None and (step == 1 or step % every == 0) and bool(self.active)

    def begin(self, step: int) -> None:
        """Listen to every layer during this step, when one is due."""
        if self.is_due(step):
            self._sums, self._calls = {}, dict.fromkeys(self.active, 0)
            for name, layer in self.active.items():
                layer.meter = partial(self._measure_output, name)

    @torch.no_grad()
    def _add(self, name: str, product: str, reference: Tensor, found: Tensor) -> None:
        for dim in DIRECTIONS[product]:
            entry = self._sums.setdefault((name, product, dim), [0.0, 0.0])
            share, count = noise_shares(reference, found, dim)
            entry[0], entry[1] = entry[0] + share, entry[1] + count

    def _measure_output(self, name: str, layer: nn.Module, rows: Tensor, output: Tensor) -> Tensor:
        """rows (T, K), output (T, N) -> that output. Called inside the layer's forward pass, where an engine has its weight gathered."""
        self._calls[name] += 1
        with torch.no_grad():
            self._add(name, "output", F.linear(rows, layer.weight), output)
        if not output.requires_grad:
            return output
        return _Heard.apply(output, rows.detach(), partial(self._measure_gradients, name, layer, rows.requires_grad))

    def _measure_gradients(self, name: str, layer: nn.Module, passes_on: bool, rows: Tensor, gradient: Tensor) -> None:
        """gradient (T, N). Called in the backward pass when it reaches the layer, whose weight is gathered again."""
        if self._sums is None:
            return
        weight = layer.weight.detach().requires_grad_(layer.weight.requires_grad)
        rows = rows.detach().requires_grad_(passes_on)
        with torch.enable_grad():
            inputs = [tensor for tensor in (rows, weight) if tensor.requires_grad]
            found = dict(zip(map(id, inputs), torch.autograd.grad(layer.product(rows, weight), inputs, gradient), strict=True))
        with torch.no_grad():
            if passes_on:
                self._add(name, "gradient of its input", gradient @ weight, found[id(rows)])
            if weight.requires_grad:
                self._add(name, "gradient of its weights", gradient.T @ rows, found[id(weight)])

    def end(self, step: int, device: torch.device) -> list[dict]:
        """What there is to tell after a step: [] when nothing was measured, else an event with the figures and one for each layer that was
        put back, each {"event", "text", ...}.

        Raises ValueError on every rank when a converted layer did not run.
        """
        if self._sums is None:
            return []
        names = list(self.active)
        for layer in self.active.values():
            layer.meter = None
        places = [(name, product, dim) for name in names for product in PRODUCTS for dim in DIRECTIONS[product]]
        own = [[float(value) for value in self._sums.get(place, (0.0, 0.0))] for place in places]
        own += [[float(self._calls[name]), 0.0] for name in names]
        self._sums = None
        sums = sum_over_ranks(torch.tensor(own, dtype=torch.float64), device).tolist()
        silent = [name for name, (calls, _) in zip(names, sums[len(places) :], strict=True) if not calls]
        if silent:
            raise ValueError(
                f"{len(silent)} layers were converted to FP8 and did not run in step {step}: {', '.join(silent[:4])}"
                f"{' ...' if len(silent) > 4 else ''}; something reads their weights past the layer (a fused kernel)"
            )
        shares = {place: share / count for place, (share, count) in zip(places, sums[: len(places)], strict=True) if count}
        self.last = {name: _Finding(_decibels(name, shares)) for name in names}
        return self._judge(step, names)

    def _judge(self, step: int, names: list[str]) -> list[dict]:
        least = self.settings.guard_min_db
        (worst, product), name = min((self.last[name].worst, name) for name in names)
        text = f"fp8 at step {step}: {len(names)} layers, worst {worst:.1f} dB ({name}, {product})"
        figures = {name: self.last[name].decibels for name in names}
        events = [{"event": "fp8_measured", "text": text, "worst_db": worst, "worst_layer": name, "db": figures}]
        for name in names:
            worst, product = self.last[name].worst
            if least is not None and worst < least:
                self._put_back(name)
                dtype = str(self.report.layers[name].weight.dtype).removeprefix("torch.")
                text = f"fp8 at step {step}: {name} goes back to {dtype}: {worst:.1f} dB in the {product}, below {least:g} dB"
                events.append(
                    {"event": "fp8_put_back", "text": text, "layer": name, "product": product, "db": worst, "guard_min_db": least}
                )
        return events

    def rows(self) -> list[list[str]]:
        """The report's rows, as things stand: place, name, shape, state; with what was measured last."""
        result = []
        for place, name, shape, state in self.report.rows():
            if name in self.put_back:
                state = "put back by the guard"
            if name in self.last:
                state += f" ({self.last[name].worst[0]:.1f} dB)"
            result.append([place, name, shape, state])
        return result


def _decibels(name: str, shares: dict[tuple[str, str, int], float]) -> dict[str, float | None]:
    result = {}
    for product in PRODUCTS:
        found = [shares[place] for dim in DIRECTIONS[product] if (place := (name, product, dim)) in shares]
        result[product] = min(MOST_DB, 10.0 * math.log10(1.0 / max(*found, 1e-30))) if found else None
    return result


def start_fp8(model: nn.Module, settings: Fp8, *, on_gpu: bool = True) -> Fp8Guard | None:
    """Convert the decoder of a vision-language model, in place, when the recipe says so; call it before an engine is started. `on_gpu`:
    whether it will run on the GPU, if there is one.

    Raises ImportError without torchao, ValueError when no layer can be converted.
    """
    if not settings.enabled:
        return None
    report = convert_to_fp8(
        model.language_model, skip_first=settings.skip_first, skip_last=settings.skip_last,
        emulate=not (on_gpu and has_fp8_units()), compiled=settings.compile and on_gpu and has_fp8_units(),
    )  # fmt: skip
    return Fp8Guard(report, settings)
