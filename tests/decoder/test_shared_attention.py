"""Attention that reads shared keys once equals attention over each row's copy of them."""

import pytest
import torch
import torch.nn.functional as F

from vlm.decoder.shared_attention import attend_shared


@pytest.mark.parametrize("even", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_it_is_attention_over_copies(even, dtype):
    torch.manual_seed(0)
    rows, heads, repeats, width, shared, own = 5, 2, 3, 8, 11, 6
    query = torch.randn(rows, heads, repeats, width).to(dtype)
    keys, values = torch.randn(2, heads, shared, width).to(dtype)
    own_keys, own_values = torch.randn(2, rows, heads, own, width).to(dtype)
    lengths = torch.tensor([1, 6, 3, 2, 6])
    visible = None if even else (torch.arange(own) < lengths[:, None])[:, None, None]
    if not even:
        own_keys[0, :, 1:] = 1e4  # an earlier occupant's
        own_values[0, :, 1:] = 1e4
    found = attend_shared(query, keys, values, own_keys, own_values, visible, 0.3)
    copies = [torch.cat([part.expand(rows, -1, -1, -1), mine], dim=2) for part, mine in ((keys, own_keys), (values, own_values))]
    mask = None if even else torch.cat([torch.ones(rows, 1, 1, shared, dtype=torch.bool), visible], dim=-1)
    expected = F.scaled_dot_product_attention(query.double(), *(each.double() for each in copies), attn_mask=mask, scale=0.3)
    # in bfloat16 nothing but the result is rounded
    torch.testing.assert_close(
        found.double(), expected, rtol=1e-12 if dtype == torch.float64 else 2**-8, atol=1e-12 if dtype == torch.float64 else 1e-5
    )
