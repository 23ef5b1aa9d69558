"""A GPU that is not there, so that code for one runs in a test without one: right numbers and strict manners, no speed.

Its tensors say cuda:1 and hold what a processor computes. As with a real one, an operation that gets tensors of two devices raises, and a
stretch of operations can be captured: then they are noted without any effect, with the memory they were given and the numbers the host
had at the time, what needs the host raises, and a replay does the same on the same memory. The current device is cuda:0, as in a process
that was told to compute on another one and has not said so to torch: what is captured there is not what runs on cuda:1.

Not here: streams (all work is done when it is asked for), memory that runs out, and what a kernel for GPUs would compute.
"""

import contextlib
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

__all__ = ["PretendGpu", "PretendTensor"]

aten, SDPA = torch.ops.aten, F.scaled_dot_product_attention
MOVING = {aten._to_copy.default, aten.copy_.default}
INDEXED_BY_HOST = {aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default}  # torch moves the places there by itself
NEEDS_HOST = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten.equal.default,
    aten.is_nonzero.default,
}


class PretendTensor(Tensor):
    """`inner` on the processor, which says that it is elsewhere. To torch's C++ it is a meta tensor: nothing there reads its memory."""

    @staticmethod
    def __new__(cls, inner: Tensor, gpu: "PretendGpu"):
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype, device="meta"
        )

    def __init__(self, inner: Tensor, gpu: "PretendGpu"):
        self.inner, self.gpu = inner, gpu

    def __repr__(self):
        return f"PretendTensor({self.inner})"

    @property
    def device(self) -> torch.device:
        return self.gpu.device

    @property
    def is_cuda(self) -> bool:
        return True

    @property
    def is_meta(self) -> bool:
        return False

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        if function is Tensor.__setitem__ and not isinstance(
            args[2], Tensor
        ):  # torch would make a tensor of the number where it takes this to be
            args = (*args[:2], torch.tensor(args[2], dtype=args[0].dtype, device=args[0].device))
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        gpu = next(leaf.gpu for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, PretendTensor))
        return gpu.run(operation, args, kwargs or {})


class _Graph:
    """What `torch.cuda.CUDAGraph` is: operations with the memory they read and write."""

    def __init__(self):
        self.noted: list[tuple] = []

    def replay(self) -> None:
        with torch.inference_mode():  # which may write to every tensor, those made in it too
            for operation, args, kwargs, found in self.noted:
                again = operation(*args, **kwargs)
                if all(way.alias_info is None for way in operation._schema.returns):  # neither a view nor written in place
                    for old, new in zip(tree_leaves(found), tree_leaves(again), strict=True):
                        old.copy_(new)


class _Everywhere(TorchDispatchMode):
    """New tensors and copies to the device, which no PretendTensor is part of yet."""

    def __init__(self, gpu: "PretendGpu"):
        super().__init__()
        self.gpu = gpu

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return self.gpu.run(operation, args, kwargs or {})


class PretendGpu:
    """`with PretendGpu(monkeypatch) as gpu:` tensors can be put on `gpu.device`; `gpu.put` moves a module there for good."""

    def __init__(self, monkeypatch, index: int = 1):
        self.device, self.current = torch.device("cuda", index), 0
        self.graph: _Graph | None = None  # being captured
        self.before: dict[int, tuple[Tensor, Tensor]] = {}  # what captured operations have written over
        self.refused: list[str] = []
        self.monkeypatch = monkeypatch

    def __enter__(self) -> "PretendGpu":
        patch = self.monkeypatch.setattr
        patch(torch.cuda, "_lazy_init", lambda: None)
        patch(F, "scaled_dot_product_attention", _attention)
        patch(torch.cuda, "Stream", lambda *_, **__: SimpleNamespace(wait_stream=lambda other: None))
        patch(torch.cuda, "current_stream", lambda *_: SimpleNamespace(wait_stream=lambda other: None))
        patch(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
        patch(torch.cuda, "synchronize", lambda *_: self._host_waits("synchronize"))
        patch(torch.cuda, "device", self._made_current)
        patch(torch.cuda, "get_device_name", lambda *_: "no GPU at all")
        patch(torch.cuda, "Event", lambda **_: SimpleNamespace(record=lambda: None, elapsed_time=lambda other: 1.0))
        patch(torch.cuda, "mem_get_info", lambda *_: (2**33, 2**34))
        patch(torch.cuda, "CUDAGraph", _Graph)
        patch(torch.cuda, "graph_pool_handle", lambda: (0, 1))
        patch(torch.cuda, "graph", self._capturing)
        torch._C._set_only_lift_cpu_tensors(True)
        self.mode = _Everywhere(self)
        self.mode.__enter__()
        return self

    def __exit__(self, *what) -> None:
        self.mode.__exit__(*what)
        torch._C._set_only_lift_cpu_tensors(False)

    def put(self, module: nn.Module) -> nn.Module:
        """The parameters and buffers of a module, as `module.to(device)`; shared ones stay shared."""
        moved: dict[int, PretendTensor] = {}
        for part in module.modules():
            for kind in (part._parameters, part._buffers):
                for name, tensor in kind.items():
                    if tensor is None:
                        continue
                    if id(tensor) not in moved:
                        there = PretendTensor(tensor.detach().clone(), self)
                        moved[id(tensor)] = nn.Parameter(there, tensor.requires_grad) if kind is part._parameters else there
                    kind[name] = moved[id(tensor)]
        return module

    @contextlib.contextmanager
    def _made_current(self, device):
        before, self.current = self.current, torch.device(device).index
        try:
            yield
        finally:
            self.current = before

    @contextlib.contextmanager
    def _capturing(self, graph: _Graph, pool=None, stream=None, capture_error_mode="global"):
        if self.current == self.device.index:
            self.graph = graph
        try:
            yield
        finally:
            self.graph = None
            with torch.inference_mode():
                for tensor, old in self.before.values():
                    tensor.copy_(old)
            self.before = {}

    def _host_waits(self, what: str) -> None:
        if self.graph is not None:
            self.refused.append(what)
            raise RuntimeError(f"{what}: operation not permitted when stream is capturing")

    def run(self, operation, args: tuple, kwargs: dict):
        if torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd"):
            with self.mode:  # in inference mode nothing has taken these apart yet
                return operation.decompose(*args, **kwargs)
        leaves = tree_leaves((args, kwargs))
        mine = [leaf for leaf in leaves if isinstance(leaf, PretendTensor)]
        others = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, PretendTensor)]
        wanted = kwargs.get("device")
        # "meta" is where torch's own code takes these tensors to be: the zeros of autograd, the numbers of `where`.
        is_here = bool(mine) if wanted is None else torch.device(wanted) == self.device or torch.device(wanted).type == "meta"
        if not mine and not is_here:
            return operation(*args, **kwargs)
        if operation in MOVING:
            if others or (wanted is not None and not is_here):
                self._host_waits(str(operation))
            is_here = is_here and not (operation is aten.copy_.default and others and others[0] is args[0])
        elif any(other.dim() for other in others) and operation not in INDEXED_BY_HOST:
            raise RuntimeError(f"{operation}: expected all tensors to be on the same device, found {self.device} and {others[0].device}")
        elif operation is aten.native_batch_norm_backward.default and any(part is None for part in (args[2], *args[5:7])):
            raise RuntimeError("native_batch_norm_backward: INTERNAL ASSERT FAILED, a GPU reads weight, save_mean and save_invstd")
        elif others and operation in INDEXED_BY_HOST or operation in NEEDS_HOST:
            self._host_waits(str(operation))
        kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"} | ({"device": "cpu"} if wanted is not None else {})
        args, kwargs = tree_map(_inner, (args, kwargs))
        if self.graph is not None:
            self._remember(operation, args, kwargs)
        found = operation(*args, **kwargs)
        if self.graph is not None:
            self.graph.noted.append((operation, args, kwargs, found))
        return self._outside(operation, mine, found) if is_here else found

    def _remember(self, operation, args: tuple, kwargs: dict) -> None:
        """What this operation writes over: a captured one has no effect yet."""
        for place, argument in enumerate(operation._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written = kwargs[argument.name] if argument.name in kwargs else args[place]
                for tensor in written if isinstance(written, (tuple, list)) else [written]:
                    self.before.setdefault(id(tensor), (tensor, tensor.clone()))

    def _outside(self, operation, mine: list[PretendTensor], found):
        """What is handed back: the very tensor that was written in place, or a new one around what came out."""
        if operation._schema.is_mutable:
            known = {id(tensor.inner): tensor for tensor in mine}
            return tree_map(lambda part: known.get(id(part), part), found)
        # Views of an ordinary tensor are ordinary too, in inference mode as well.
        is_view = any(way.alias_info is not None for way in operation._schema.returns)
        is_ordinary = is_view and any(not tensor.is_inference() for tensor in mine)
        with torch.inference_mode(torch.is_inference_mode_enabled() and not is_ordinary):
            return tree_map(lambda part: PretendTensor(part, self) if isinstance(part, Tensor) else part, found)


def _attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """torch's own would ask the device which of its kernels to use."""
    if not isinstance(query, PretendTensor):
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if enable_gqa:
        key, value = (part.repeat_interleave(query.shape[-3] // part.shape[-3], dim=-3) for part in (key, value))
    scores = query @ key.transpose(-2, -1) * (scale if scale is not None else query.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, float("-inf")) if attn_mask.dtype == torch.bool else scores + attn_mask
    return F.dropout(scores.softmax(-1), dropout_p) @ value


def _inner(leaf):
    return leaf.inner if isinstance(leaf, PretendTensor) else leaf
