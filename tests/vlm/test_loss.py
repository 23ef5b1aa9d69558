"""The loss of picked positions against cross-entropy over all logits, written out."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vlm.loss import IGNORE_INDEX, count_supervised_tokens, shift_labels, supervised_loss


def example(length=50, batch=2, share=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(batch, length, 8, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 30, (batch, length), generator=generator)
    labels[torch.rand(batch, length, generator=generator) > share] = IGNORE_INDEX
    head = nn.Linear(8, 30, bias=False).double()
    return hidden, labels, head


@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 1000])
def test_it_equals_cross_entropy_of_all_logits(chunk_tokens):
    """Loss, and gradients of hidden states and head, in chunks and at once."""
    hidden, labels, head = example()
    a, b = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    full = F.cross_entropy(head(a).float()[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORE_INDEX)
    expected = torch.autograd.grad(full, [a, head.weight])
    losses, places = supervised_loss(b, head, labels, chunk_tokens=chunk_tokens)
    found = torch.autograd.grad(losses.sum(), [b, head.weight])
    torch.testing.assert_close(losses.sum(), full)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    assert len(losses) == len(places) == count_supervised_tokens(labels)
    each = F.cross_entropy(head(hidden).float().flatten(0, 1)[places], shift_labels(labels).flatten()[places], reduction="none")
    torch.testing.assert_close(losses, each)


def test_labels_are_shifted_once():
    """Shifted by the data and by the loss, a model learns the word after the next."""
    assert shift_labels(torch.tensor([[5, 6, 7]])).tolist() == [[6, 7, IGNORE_INDEX]]


def test_no_position_predicts_its_neighbour_s_first_token():
    """In a pack the end of one sample would else learn the start of the next."""
    labels, seq_idx = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[0, 0, 1, 1, 2]])
    assert shift_labels(labels, seq_idx).tolist() == [[6, IGNORE_INDEX, 8, IGNORE_INDEX, IGNORE_INDEX]]
    assert count_supervised_tokens(labels, seq_idx) == 2


def test_a_pack_loses_what_its_samples_lose():
    hidden, labels, head = example(batch=1, share=0.9)
    seq_idx = torch.tensor([0] * 20 + [1] * 30)[None]
    packed, _ = supervised_loss(hidden, head, labels, seq_idx)
    parts = [supervised_loss(h, head, y)[0] for h, y in zip(hidden.split([20, 30], 1), labels.split([20, 30], 1), strict=True)]
    torch.testing.assert_close(packed, torch.cat(parts))


def test_without_a_supervised_token_there_is_a_loss_of_zero_with_gradients_of_zero():
    """Every rank must run the same backward pass; mean of nothing would be NaN."""
    hidden, labels, head = example()
    hidden.requires_grad_()
    losses, places = supervised_loss(hidden, head, torch.full_like(labels, IGNORE_INDEX))
    assert losses.shape == places.shape == (0,)
    gradients = torch.autograd.grad(losses.sum(), [hidden, head.weight])
    assert not any(gradient.any() for gradient in gradients)


def test_half_precision_logits_are_summed_in_float32():
    hidden, labels, head = example()
    losses, _ = supervised_loss(hidden.bfloat16(), head.bfloat16(), labels)
    assert losses.dtype == torch.float32
