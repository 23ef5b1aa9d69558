"""Attention of rows whose pasts begin with the same tokens: those keys and values are read once for all rows.

Thirty questions about one picture hold thirty copies of its keys. One product of all rows' queries with one of them gives the scores of
that part, another per row those of its own tokens; one softmax over both (Hydragen does so on a GPU: Juravsky et al. 2024, arXiv
2402.05099).
`scaled_dot_product_attention` over each row's copy is the reference.

Letters: R rows, KV key heads, r query heads per key head, E head width, M shared tokens, S slots looked at.
"""

import torch
from torch import Tensor

__all__ = ["attend_shared"]


def attend_shared(
    query: Tensor, shared_keys: Tensor, shared_values: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """query (R, KV, r, E); shared_keys, shared_values (KV, M, E); keys, values (R, KV, S - M, E), what comes after; visible
    (R, 1, 1, S - M) bool or None -> (R, KV, r, E). Scores and sums are made in the query's dtype, the softmax in float32 at least."""
    rows, heads, repeats, width = query.shape
    query = query * scale
    together = query.transpose(0, 1).reshape(heads, rows * repeats, width)
    shared = torch.bmm(together, shared_keys.mT).view(heads, rows, repeats, -1).transpose(0, 1)
    own = torch.matmul(query, keys.mT)
    if visible is not None:
        own = own.masked_fill(~visible, float("-inf"))
    wide = torch.promote_types(query.dtype, torch.float32)
    weights = torch.cat([shared, own], dim=-1).softmax(-1, dtype=wide).to(query.dtype)
    shared, own = weights.split([shared_keys.shape[1], keys.shape[2]], dim=-1)
    out = torch.bmm(shared.transpose(0, 1).reshape(heads, rows * repeats, -1), shared_values)
    return out.view(heads, rows, repeats, width).transpose(0, 1) + torch.matmul(own, values)
