"""Products with weights laid out for them beforehand: the same result, sooner, on a processor.

torch gives float32 products to MKL, with the weight as it lies in memory. oneDNN, which torch carries too, has kernels of its own and lays
a weight out for them: with one thread of an AVX-512 processor of AMD's 110 GFLOP/s instead of 95 for 120 rows and more, 111 instead of 80
for 30, 88 instead of 35 for 4. In bfloat16, where torch asks oneDNN anyway but lays the weight out at every call, few rows gain as much.
The price is a second copy of the weight, so whoever asks says how much memory there is; and some 20 microseconds a call, so small products
do without.
"""

import platform
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["PackedWeights"]

LEAST_PRODUCTS = 2**19
"""Rows x inputs x outputs below which the plain call is as fast."""
DTYPES = (torch.float32, torch.bfloat16)


@cache
def _operators():
    """oneDNN's two operators, as torch.compile's CPU backend calls them, or None without them and where nobody tried them."""
    known = torch.ops.mkldnn
    if platform.machine() not in ("x86_64", "AMD64"):
        return None
    if torch.backends.mkldnn.is_available() and hasattr(known, "_linear_pointwise") and hasattr(known, "_reorder_linear_weight"):
        return known._linear_pointwise, known._reorder_linear_weight
    return None


class _PackedWeight:
    """One weight (outputs, inputs), packed at its first use; anew when it was changed in place."""

    def __init__(self, weight: nn.Parameter, owner: "PackedWeights"):
        self.weight, self.owner = weight, owner
        self.multiply, self.reorder = _operators()
        self.packed, self.of, self.bytes = None, None, 0

    def product(self, x: Tensor, bias: Tensor | None) -> Tensor | None:
        """x (.., inputs) -> (.., outputs), or None where the plain call is to be made."""
        weight = self.weight
        if x.numel() * weight.shape[0] < LEAST_PRODUCTS or x.dtype != weight.dtype:
            return None
        of = (weight.data_ptr(), weight._version)
        if of != self.of:
            self._pack(of)
        return None if self.packed is None else self.multiply(x, self.packed, bias, "none", [], "")

    def _pack(self, of: tuple[int, int]) -> None:
        self.forget()
        size = self.weight.numel() * self.weight.element_size()
        self.of = of
        if self.owner.free_bytes >= size:
            self.packed, self.bytes = self.reorder(self.weight.detach(), None), size
            self.owner.free_bytes -= size

    def forget(self) -> None:
        self.owner.free_bytes += self.bytes
        self.packed, self.of, self.bytes = None, None, 0


class _PackedLinear:
    """A linear layer as a callable."""

    def __init__(self, module: nn.Linear, weight: _PackedWeight):
        self.module, self.weight = module, weight

    def __call__(self, x: Tensor) -> Tensor:
        y = self.weight.product(x, self.module.bias)
        return self.module(x) if y is None else y


class _InsteadOfLinear(TorchFunctionMode):
    """While it is entered, every product with one of these weights is made with its packed form."""

    def __init__(self, weights: dict[int, _PackedWeight]):
        super().__init__()
        self.weights = weights

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.linear and not kwargs and len(args) > 1 and id(args[1]) in self.weights:
            y = self.weights[id(args[1])].product(args[0], args[2] if len(args) > 2 else None)
            if y is not None:
                return y
        return function(*args, **(kwargs or {}))


class PackedWeights:
    """Packs weights at their first use until `most_bytes` are used up; what comes after stays plain. For inference mode."""

    def __init__(self, most_bytes: int):
        self.free_bytes = most_bytes
        self.weights: dict[int, _PackedWeight] = {}  # holds each weight, so that no other gets its id

    def _weight(self, module: nn.Module) -> _PackedWeight | None:
        """None where there is nothing to gain: on other devices, in other dtypes, and for anything that is not a plain linear layer."""
        weight = getattr(module, "weight", None)
        if type(module) is not nn.Linear or type(weight) is not nn.Parameter or weight.is_inference() or _operators() is None:
            return None
        if self.free_bytes <= 0 or weight.device.type != "cpu" or weight.dtype not in DTYPES:
            return None
        return self.weights.setdefault(id(weight), _PackedWeight(weight, self))

    def of(self, module: nn.Module):
        """A callable (.., inputs) -> (.., outputs) that computes what `module` does: itself if it has hooks, is an adapter, quantised."""
        weight = None if module._forward_hooks or module._forward_pre_hooks else self._weight(module)
        return module if weight is None else _PackedLinear(module, weight)

    def within(self, *modules: nn.Module) -> TorchFunctionMode:
        """A context in which linear layers inside these modules, whoever wrote them, multiply with packed weights."""
        found = (self._weight(module) for each in modules for module in each.modules())
        return _InsteadOfLinear({id(weight.weight): weight for weight in found if weight is not None})

    def forget(self) -> None:
        """Give the memory back; what is used again is packed again. For weights changed where torch does not count it (`.data`)."""
        for weight in self.weights.values():
            weight.forget()
