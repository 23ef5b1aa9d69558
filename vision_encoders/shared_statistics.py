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

from vision_encoders.gathering import gather_over_ranks

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
    On one rank none: there is nothing to share.

    From then on a pass in training mode is a collective: every rank makes as many, in the same order. Tiles within `unmoved_statistics`
    (running_statistics.py) are normalised by the others' statistics and count in none. In eval mode nothing changes.
    """
    layers = [module for _, module in trained_batch_norms(encoder)]
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return 0
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
        if number is None and module.track_running_stats and module.num_batches_tracked is not None:
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
) -> tuple[Tensor, Tensor | None]:
    """x (N, C, ...) -> the same shape and dtype, normalised by mean and variance (C,) of all ranks' x that counts, computed in float32 at
    least, and over how many numbers those are, (). The running ones move by them, on every rank alike. Where no rank's x counts it is
    normalised by its own, nothing moves, and the number is None."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    mean, var, number = _joined(wide.detach(), counts)
    if number is None:
        return F.batch_norm(x, None, None, weight, bias, True, momentum, eps), None
    if running_mean is not None:
        with torch.no_grad():
            running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            running_var.lerp_((var * (number / (number - 1).clamp_min(1))).to(running_var.dtype), momentum)
    scale, shift = (None if each is None else each.to(wide.dtype) for each in (weight, bias))
    return _Normalize.apply(wide, mean, var, scale, shift, eps, number, counts).to(x.dtype), number


def _joined(x: Tensor, counts: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Mean and variance (C,) over the x (N, C, ...) of all ranks that counts, and over how many numbers (), or None; the same to the bit on
    each."""
    others, size = [place for place in range(x.dim()) if place != 1], x.numel() // x.shape[1]
    mean = x.mean(others)
    # A tenth of the time of torch.var_mean, which goes number by number on a processor.
    var = (x - _by_channel(mean, x)).square_().sum(others).div_(size)
    number = mean.new_full((1,), size if counts else 0)
    own = torch.cat([mean, var, number]).double()
    means, variances, numbers = gather_over_ranks(own).split([len(mean), len(mean), 1], dim=1)  # R C, R C, R 1
    total = numbers.sum()
    if not counts and total == 0:  # a rank whose x counts need not ask, which on a GPU is waiting for the answer
        return mean, var, None
    share = numbers / total
    joined = (means * share).sum(0)
    spread = (means - joined).square_().add_(variances).mul_(share).sum(0)
    return joined.to(mean.dtype), spread.to(mean.dtype), total.to(mean.dtype)


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) -> (1, C, 1, ...) of as many dimensions as x."""
    return values.view(1, -1, *(1,) * (x.dim() - 2))


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
        # 1. With fixed statistics: the sums over this rank's x for weight and bias, and gradient * weight / deviation.
        gradient, inverse = gradient.contiguous(memory_format=_format(x)), (var + ctx.eps).rsqrt()
        # A GPU takes the statistics from the saved ones and reads the weight's dtype even where only sums are wanted.
        unit = torch.ones_like(mean) if weight is None else weight
        _, of_weight, of_bias = torch.ops.aten.native_batch_norm_backward(
            gradient, x, unit, mean, var, mean, inverse, False, ctx.eps, [False, True, True]
        )
        scale = inverse if weight is None else inverse * weight
        of_x = gradient * _by_channel(scale, x)
        # 2. Through the statistics: those sums over all ranks, back to every x that counted.
        sums = gather_over_ranks(torch.cat([of_weight, of_bias])).sum(0)
        if ctx.counts:
            through_deviation, through_mean = (sums / ctx.number).chunk(2)
            slope = -scale * through_deviation * inverse
            of_x.addcmul_(x, _by_channel(slope, x)).sub_(_by_channel(slope * mean + scale * through_mean, x))
        return of_x, None, None, None if weight is None else of_weight, of_bias if ctx.has_bias else None, None, None, None
