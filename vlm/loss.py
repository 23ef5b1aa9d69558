"""Cross-entropy on supervised positions only.

A 13-tile sample has some 3,400 positions and a handful of answer tokens, and the vocabulary has 131,072 words: logits of every position
would be most of the memory of a step. Positions are picked first, then pass the output head in chunks whose logits are made again in the
backward pass (benchmarks/loss.py measures it). A head that is a plain linear layer takes the way that allocates one chunk of logits and one
gradient of its weight; any other (wrapped by adapters or FP8, gathered from other ranks, watched by hooks) is called as the module it is,
and once only where its weights are gathered from other ranks.

Letters: B batch, T positions, D decoder width, K supervised positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["IGNORE_INDEX", "count_supervised_tokens", "shift_labels", "supervised_loss"]

IGNORE_INDEX = -100
LOGITS_AT_ONCE = 2**25  # 128 MB in float32: 256 positions of a vocabulary of 131,072


def shift_labels(labels: Tensor, seq_idx: Tensor | None = None) -> Tensor:
    """labels (B, T), not shifted by the data -> (B, T): what each position must predict, IGNORE_INDEX where nothing.

    With `seq_idx` (B, T) the last position of a packed sequence predicts nothing: its successor belongs to a neighbour.
    """
    targets = torch.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    if seq_idx is not None:
        targets[:, :-1].masked_fill_(seq_idx[:, 1:] != seq_idx[:, :-1], IGNORE_INDEX)
    return targets


def count_supervised_tokens(labels: Tensor, seq_idx: Tensor | None = None) -> int:
    """How many positions of labels (B, T) the loss counts."""
    return int((shift_labels(labels, seq_idx) != IGNORE_INDEX).sum())


class _LinearCrossEntropy(torch.autograd.Function):
    """hidden (K, D), weight (V, D), targets (K,) -> losses (K,) float32; logits of `chunk` positions at a time, in one buffer.

    The softmax is made in place of the logits. In one chunk it is kept for the backward pass, in several it is made again.
    """

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, chunk: int) -> Tensor:
        buffers = _Buffers(hidden, weight, chunk)
        largest, sums, aimed = (torch.empty(len(hidden), dtype=torch.float32, device=hidden.device) for _ in range(3))
        for rows in buffers.chunks:
            logits = buffers.logits(hidden[rows], weight)
            largest[rows] = logits.amax(-1)
            aimed[rows] = logits.gather(-1, targets[rows, None]).squeeze(-1)
            sums[rows] = logits.sub_(largest[rows, None]).exp_().sum(-1)
        ctx.kept = logits if len(buffers.chunks) == 1 else None  # exp(logits - largest)
        ctx.chunk = chunk
        ctx.save_for_backward(hidden, weight, targets, largest, sums)
        return sums.log() + largest - aimed

    @staticmethod
    def backward(ctx, gradient: Tensor):
        hidden, weight, targets, largest, sums = ctx.saved_tensors
        buffers = _Buffers(hidden, weight, ctx.chunk)
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for rows in buffers.chunks:
            if ctx.kept is not None:
                errors = ctx.kept * (gradient[rows] / sums[rows])[:, None]
            else:
                errors = buffers.logits(hidden[rows], weight).sub_(largest[rows, None]).exp_()
                errors.mul_((gradient[rows] / sums[rows])[:, None])
            errors.scatter_add_(-1, targets[rows, None], -gradient[rows, None])
            errors = buffers.narrow(errors)
            if to_hidden is not None:
                torch.mm(errors, weight, out=to_hidden[rows])
            if to_weight is not None:
                to_weight.addmm_(errors.T, hidden[rows])
        return to_hidden, to_weight, None, None


class _Buffers:
    """Memory for the logits of one chunk, in the head's dtype and, where that is another one, in float32."""

    def __init__(self, hidden: Tensor, weight: Tensor, chunk: int):
        count = len(hidden)
        self.chunks = [slice(start, min(start + chunk, count)) for start in range(0, count, chunk)]
        shape = (min(chunk, count), weight.shape[0])
        self.own = torch.empty(shape, dtype=weight.dtype, device=weight.device)
        self.wide = self.own if weight.dtype == torch.float32 else torch.empty(shape, dtype=torch.float32, device=weight.device)

    def logits(self, hidden: Tensor, weight: Tensor) -> Tensor:
        """(rows, V) float32, in the buffer."""
        own, wide = self.own[: len(hidden)], self.wide[: len(hidden)]
        torch.mm(hidden, weight.T, out=own)
        return own if wide.dtype == own.dtype else wide.copy_(own)

    def narrow(self, errors: Tensor) -> Tensor:
        """(rows, V) float32 -> in the head's dtype."""
        return errors if errors.dtype == self.own.dtype else self.own[: len(errors)].copy_(errors)


def _is_plain(head: nn.Module, hidden: Tensor) -> bool:
    """Whether the head is nothing but `hidden @ weight.T`: no bias, wrapper, hook, weight on other ranks (DeepSpeed ZeRO-3) or autocast."""
    return (
        type(head) is nn.Linear
        and "forward" not in vars(head)
        and not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks or head._backward_pre_hooks)
        # Only now: under ZeRO-3 merely looking at the weight gathers it, on those ranks that look.
        and type(head.weight) is nn.Parameter
        and head.bias is None
        and not hasattr(head.weight, "ds_id")
        and head.weight.dtype == hidden.dtype
        and not torch.is_autocast_enabled(hidden.device.type)
    )


def _is_shared_out(head: nn.Module) -> bool:
    """Whether other ranks hold parts of its weights (DeepSpeed ZeRO-3), which each call of it gathers."""
    return any(hasattr(parameter, "ds_id") for parameter in head.parameters())


def _in_one_call(hidden: Tensor, head: nn.Module, targets: Tensor, chunk: int) -> Tensor:
    """hidden (K, D) -> losses (K,), with one call of the head however many positions there are: ranks have different numbers of them, and
    each call is a gathering in which all ranks take part. Chunks of a plain linear head are made within the call."""
    if type(head) is not nn.Linear or "forward" in vars(head):
        return _chunk_loss(hidden, head, targets)
    head.forward = lambda hidden: _linear_losses(hidden, head.weight, head.bias, targets, chunk)
    try:
        return head(hidden)
    finally:
        del head.forward


def _linear_losses(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, chunk: int) -> Tensor:
    if bias is None and weight.dtype == hidden.dtype and not torch.is_autocast_enabled(hidden.device.type):
        return _LinearCrossEntropy.apply(hidden, weight, targets, chunk)
    return F.cross_entropy(F.linear(hidden, weight, bias).float(), targets, reduction="none")


def _chunk_loss(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def supervised_loss(
    hidden: Tensor, head: nn.Module, labels: Tensor, seq_idx: Tensor | None = None, *, chunk_tokens: int | None = None
) -> tuple[Tensor, Tensor]:
    """hidden (B, T, D), labels (B, T) -> the loss of each supervised position (K,) float32, and its place in the flattened batch (K,).

    The sum over K is the loss of the batch; the caller divides by the supervised tokens of the whole step. K may be 0 (the result then
    still hangs on `hidden` and the head, so that every rank runs the same backward pass). `chunk_tokens`: positions whose logits exist
    at once; by default as many as fit in 128 MB of float32.
    """
    targets = shift_labels(labels, seq_idx).flatten()
    places = (targets != IGNORE_INDEX).nonzero().squeeze(-1)
    picked, wanted = hidden.flatten(0, 1).index_select(0, places), targets.index_select(0, places)
    if not len(places):
        return (head(hidden[0, :1]).float().sum() * 0.0)[None][:0] + hidden.sum() * 0.0, places
    if chunk_tokens is None:
        chunk_tokens = max(1, LOGITS_AT_ONCE // getattr(head, "out_features", 131072))
    if _is_plain(head, hidden):
        return _LinearCrossEntropy.apply(picked, head.weight, wanted, chunk_tokens), places
    if _is_shared_out(head):
        return _in_one_call(picked, head, wanted, chunk_tokens), places
    if len(places) <= chunk_tokens:  # one chunk is no more than memory was set aside for: nothing is made twice
        return _chunk_loss(picked, head, wanted), places
    losses = [
        checkpoint(_chunk_loss, piece, head, goal, use_reentrant=False)
        for piece, goal in zip(picked.split(chunk_tokens), wanted.split(chunk_tokens), strict=True)
    ]
    return torch.cat(losses), places
