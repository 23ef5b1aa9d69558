"""BatchNorm over the tiles of all ranks: a training encoder then normalises by the same numbers whoever has which tile.

`torch.nn.SyncBatchNorm` is the same idea; it has no kernel for processors, counts a blank tile as an image, and stands in the place of
the layer, so that what libraries add to theirs (timm's activation, dropout) is lost. Here a layer's own forward stays, and only the
normalisation inside it is exchanged. Mean and variance of the ranks are joined by Chan, Golub and LeVeque (1983, "Algorithms for computing
the sample variance", eq. 2.1); the gradient goes through them on all ranks (Ioffe and Szegedy 2015, arXiv 1502.03167, section 3).

Letters: N tiles, C channels, R ranks.
"""

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

__all__ = ["share_statistics", "trained_batch_norms"]


def trained_batch_norms(encoder: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, layer) of the layers that normalise by their batch in training mode as `encoder` is set now; SyncBatchNorm apart, which
    shares by itself."""
    return [
        (name, module) for name, module in encoder.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not isinstance(module, nn.SyncBatchNorm) and module.training
    ]  # fmt: skip


def share_statistics(encoder: nn.Module) -> int:
    """Let the BatchNorm layers of `encoder` that train normalise by the tiles of all ranks of the default process group; returns how many.

    From then on a pass in training mode is a collective: every rank makes as many, in the same order. Tiles within `unmoved_statistics`
    (running_statistics.py) are normalised by the others' statistics and count in none. In eval mode nothing changes.
    """
    layers = [module for _, module in trained_batch_norms(encoder)]
    for module in layers:
        _wrap(module)
    return len(layers)


def _wrap(module: nn.Module) -> None:
    plain, sharing = module.forward, _InsteadOfBatchNorm(module)

    def forward(x: Tensor) -> Tensor:
        if not module.training:
            return plain(x)
        with sharing:
            return plain(x)

    module.forward, module.counts_in_statistics = forward, True


class _InsteadOfBatchNorm(TorchFunctionMode):
    """While it is entered, `batch_norm` by the batch at hand is one by the tiles of all ranks."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.batch_norm:
            return self._normalize(*args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))

    def _normalize(self, x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5) -> Tensor:
        if not training:
            return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)
        module = self.module
        y, number = shared_batch_norm(x, running_mean, running_var, weight, bias, momentum, eps, counts=module.counts_in_statistics)
        if number == 0 and module.track_running_stats and module.num_batches_tracked is not None:
            module.num_batches_tracked.sub_(1)  # the layer counted this batch before it came here
        return y


def shared_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    *,
    counts: bool = True,
) -> tuple[Tensor, int]:
    """x (N, C, ...) -> the same shape and dtype, normalised by mean and variance (C,) of all ranks' x that counts, computed in float32 at
    least, and over how many numbers those are. The running ones move by them, on every rank alike. Where no rank's x counts it is
    normalised by its own, and nothing moves."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, var, number = _joined(wide.detach(), counts)
    if number == 0:
        return F.batch_norm(x, None, None, weight, bias, True, momentum, eps), 0
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (number / max(number - 1, 1))).to(running_var.dtype), momentum)
    scale, shift = (None if each is None else each.to(wide.dtype) for each in (weight, bias))
    return _Normalize.apply(wide, mean, var, scale, shift, eps, number, counts).to(x.dtype), number


def _joined(x: Tensor, counts: bool) -> tuple[Tensor, Tensor, int]:
    """Mean and variance (C,) over the x (N, C, ...) of all ranks that counts, and over how many numbers; the same to the bit on each."""
    others = [place for place in range(x.dim()) if place != 1]
    var, mean = torch.var_mean(x, others, correction=0)
    number = x.numel() // x.shape[1] if counts else 0
    own = torch.cat([mean.double(), var.double(), mean.new_full((1,), number, dtype=torch.float64)])
    of_ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(of_ranks, own)
    means, variances, numbers = torch.stack(of_ranks).split([len(mean), len(mean), 1], dim=1)  # R C, R C, R 1
    total = numbers.sum()
    if total == 0:
        return mean, var, 0
    share = numbers / total
    joined = torch.where(share > 0, means, 0.0).mul(share).sum(0)
    spread = torch.where(share > 0, variances + (means - joined).square(), 0.0).mul(share).sum(0)
    return joined.to(mean.dtype), spread.to(mean.dtype), int(total)


def _format(x: Tensor) -> torch.memory_format:
    is_last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
    return torch.channels_last if is_last else torch.contiguous_format


class _Normalize(torch.autograd.Function):
    """(x - mean) / sqrt(var + eps) * weight + bias, where mean and variance depend on the counted x of all ranks."""

    @staticmethod
    def forward(ctx, x, mean, var, weight, bias, eps, number, counts):
        ctx.save_for_backward(x, mean, var, weight)
        ctx.eps, ctx.number, ctx.counts, ctx.has_bias = eps, number, counts, bias is not None
        return F.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)

    @staticmethod
    def backward(ctx, gradient):
        x, mean, var, weight = ctx.saved_tensors
        # 1. With fixed statistics: gradient * weight / deviation, and the sums over this rank's x for weight and bias.
        direct, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient.contiguous(memory_format=_format(x)), x, weight, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        # 2. Through the statistics: those sums over all ranks, back to every x that counted.
        sums = torch.cat([of_weight, of_bias])
        dist.all_reduce(sums)
        if ctx.counts:
            through_deviation, through_mean = (sums / ctx.number).chunk(2)
            inverse = (var + ctx.eps).rsqrt()
            scale = inverse if weight is None else inverse * weight
            shape = (1, -1) + (1,) * (x.dim() - 2)
            slope = (-scale * through_deviation * inverse).view(shape)
            direct.addcmul_(x - mean.view(shape), slope).sub_((scale * through_mean).view(shape))
        return direct, None, None, None if weight is None else of_weight, of_bias if ctx.has_bias else None, None, None, None
