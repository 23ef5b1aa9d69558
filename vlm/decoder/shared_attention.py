"""Attention of rows whose pasts begin with the same tokens: those keys and values are read once for all rows.

Thirty questions about one picture hold thirty copies of its keys. One product of all rows' queries with one of them gives the scores of
that part, another per row those of its own tokens; one softmax over both (Hydragen does so on a GPU: Juravsky et al. 2024, arXiv
2402.05099).
`scaled_dot_product_attention` over each row's copy is the reference.

Letters: R rows, KV key heads, r query heads per key head (times positions, where several of a row are asked at once), E head width, M
shared tokens, S slots looked at.
"""

import torch
from torch import Tensor

__all__ = ["attend_shared"]


def attend_shared(
    query: Tensor, shared_keys: Tensor, shared_values: Tensor, keys: Tensor, values: Tensor, visible: Tensor | None, scale: float
) -> Tensor:
    """query (R, KV, r, E); shared_keys, shared_values (KV, M, E); keys, values (R, KV, S - M, E), what comes after; visible
    bool, broadcastable to (R, KV, r, S - M), or None -> (R, KV, r, E). All of it is computed in float32 at least."""
    rows, heads, repeats, width = query.shape
    dtype = query.dtype
    wide = torch.promote_types(dtype, torch.float32)
    query, shared_keys, shared_values, keys, values = (each.to(wide) for each in (query, shared_keys, shared_values, keys, values))
    query = query * scale
    together = query.transpose(0, 1).reshape(heads, rows * repeats, width)
    shared = torch.bmm(together, shared_keys.mT).view(heads, rows, repeats, -1).transpose(0, 1)
    own = torch.matmul(query, keys.mT)
    if visible is not None:
        own = own.masked_fill(~visible, float("-inf"))
    weights = torch.cat([shared, own], dim=-1).softmax(-1)
    shared, own = weights.split([shared_keys.shape[1], keys.shape[2]], dim=-1)
    out = torch.bmm(shared.transpose(0, 1).reshape(heads, rows * repeats, -1), shared_values)
    return (out.view(heads, rows, repeats, width).transpose(0, 1) + torch.matmul(own, values)).to(dtype)
