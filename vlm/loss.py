"""Cross-entropy on supervised positions only.

A 13-tile sample has some 3,400 positions and a handful of answer tokens, and the vocabulary has 131,072 words: logits of every position
would be most of the memory of a step. Positions are picked first, then pass the output head in chunks whose logits are made again in the
backward pass.

Letters: B batch, T positions, D decoder width, K supervised positions.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ["IGNORE_INDEX", "count_supervised_tokens", "shift_labels", "supervised_loss"]

IGNORE_INDEX = -100


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


def _chunk_loss(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    return F.cross_entropy(head(hidden).float(), targets, reduction="none")


def supervised_loss(
    hidden: Tensor, head: nn.Module, labels: Tensor, seq_idx: Tensor | None = None, *, chunk_tokens: int = 1024
) -> tuple[Tensor, Tensor]:
    """hidden (B, T, D), labels (B, T) -> the loss of each supervised position (K,) float32, and its place in the flattened batch (K,).

    The sum over K is the loss of the batch; the caller divides by the supervised tokens of the whole step. K may be 0 (the result then
    still hangs on `hidden` and the head, so that every rank runs the same backward pass).
    """
    targets = shift_labels(labels, seq_idx).flatten()
    places = (targets != IGNORE_INDEX).nonzero().squeeze(-1)
    picked, wanted = hidden.flatten(0, 1).index_select(0, places), targets.index_select(0, places)
    if not len(places):
        return (head(hidden[0, :1]).float().sum() * 0.0)[None][:0] + hidden.sum() * 0.0, places
    losses = [
        checkpoint(_chunk_loss, piece, head, goal, use_reentrant=False) if len(places) > chunk_tokens else _chunk_loss(piece, head, goal)
        for piece, goal in zip(picked.split(chunk_tokens), wanted.split(chunk_tokens), strict=True)
    ]
    return torch.cat(losses), places
