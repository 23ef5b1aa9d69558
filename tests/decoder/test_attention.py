"""Attention over packs, padded rows and kept keys against plain softmax written out."""

import copy

import pytest
import torch
from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHAttention

from vlm.decoder.attention import HybridAttention
from vlm.decoder.layout import Layout
from vlm.decoder.presets import preset_config
from vlm.decoder.state import DecoderState


@pytest.fixture(scope="module")
def layer():
    torch.manual_seed(0)
    config = preset_config("tiny", pattern="*-", hidden_size=40, num_attention_heads=4, num_key_value_heads=2, head_dim=16)
    attention = NemotronHAttention(config, layer_idx=0).double().eval()
    with torch.no_grad():
        for parameter in attention.parameters():
            parameter.mul_(4)
    HybridAttention.take_over(attention)
    return attention


def by_hand(layer, hidden, visible=None):
    """hidden (T, D) -> (T, D): a loop over positions and heads; query head h reads KV head h // 2."""
    query = layer.q_proj(hidden).view(-1, 4, 16)
    key, value = layer.k_proj(hidden).view(-1, 2, 16), layer.v_proj(hidden).view(-1, 2, 16)
    rows = []
    for t in range(len(hidden)):
        heads = []
        for h in range(4):
            weights = (key[: t + 1, h // 2] @ query[t, h] / 16**0.5).softmax(0)
            heads.append(weights @ value[: t + 1, h // 2])
        rows.append(torch.cat(heads))
    return layer.o_proj(torch.stack(rows))


def rows_of(lengths):
    return torch.randn(1, sum(lengths), 40, dtype=torch.float64)


def test_one_row_equals_the_sum_by_hand(layer):
    """Scale, causal order and which query heads share a key."""
    hidden = rows_of([11])
    found, _ = layer(hidden, layout=Layout.rows([11], 11))
    torch.testing.assert_close(found[0], by_hand(layer, hidden[0]))


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [5, 9, 2, 30, 4, 4, 1, 28], [3, 200, 3]])
def test_a_pack_equals_its_sequences(layer, lengths):
    """Sequences are laid side by side by length: each must come back to its own place."""
    hidden = rows_of(lengths)
    found, _ = layer(hidden, layout=Layout.packed(lengths))
    alone = [layer(part, layout=Layout.rows([part.shape[1]], part.shape[1]))[0] for part in hidden.split(lengths, dim=1)]
    torch.testing.assert_close(found, torch.cat(alone, dim=1))


def test_gradients_do_not_cross_borders_of_a_pack(layer):
    """Padding in a group repeats a sequence's last position: its gradient must not count twice."""
    lengths = [4, 5, 3, 5]
    hidden = rows_of(lengths).requires_grad_()
    (packed,) = torch.autograd.grad((layer(hidden, layout=Layout.packed(lengths))[0] ** 2).sum(), hidden)
    alone = [(layer(part, layout=Layout.rows([part.shape[1]], part.shape[1]))[0] ** 2).sum() for part in hidden.split(lengths, dim=1)]
    (separate,) = torch.autograd.grad(sum(alone), hidden)
    torch.testing.assert_close(packed, separate)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_invisible(layer, side):
    """Also where padding holds large numbers, and without a NaN for rows that see nothing."""
    text, padding = rows_of([6]), rows_of([4]) * 1e3
    hidden = torch.cat([padding, text] if side == "left" else [text, padding], dim=1)
    mask = torch.tensor([[0] * 4 + [1] * 6 if side == "left" else [1] * 6 + [0] * 4])
    found, _ = layer(hidden, layout=Layout.from_mask(mask, 1, 10))
    assert torch.isfinite(found).all()
    torch.testing.assert_close(found[mask.bool()], by_hand(layer, text[0]))


def test_kept_keys_of_ragged_rows_equal_the_whole(layer):
    """The slots of a short row's padding stay hidden for ever, and new positions see each other in causal order."""
    texts = [rows_of([9]), rows_of([12])]
    first, second = [3, 6], [6, 6]
    state = DecoderState()
    width = 6
    start = torch.cat([torch.cat([texts[0][:, :3], rows_of([3]) * 100], dim=1), texts[1][:, :6]])
    a, _ = layer(start, layout=Layout.rows(first, width), state=state)
    state.append_slots(Layout.rows(first, width).valid)
    b, _ = layer(torch.cat([texts[0][:, 3:], texts[1][:, 6:]]), layout=Layout.rows(second, 6), state=state)
    for row, text in enumerate(texts):
        torch.testing.assert_close(torch.cat([a[row, : first[row]], b[row]]), by_hand(layer, text[0]))


def test_without_a_layout_it_is_the_stock_forward(layer):
    """transformers' own layer loop still works on our model."""
    stock = copy.deepcopy(layer)
    stock.__class__ = NemotronHAttention
    hidden = rows_of([7])
    assert torch.equal(layer(hidden, attention_mask=None)[0], stock(hidden, attention_mask=None)[0])
