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


class Wrapped(nn.Module):
    """A head that is no plain linear layer, as adapters or FP8 make it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    @property
    def weight(self):
        return self.inner.weight

    def forward(self, hidden):
        return self.inner(hidden)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 7, 1000])
def test_it_equals_cross_entropy_of_all_logits(chunk_tokens, wrapped, dtype):
    """Loss, and gradients of hidden states and head, in chunks and at once, by the short way and through a wrapper."""
    hidden, labels, head = example()
    hidden, head = hidden.to(dtype), Wrapped(head.to(dtype)) if wrapped else head.to(dtype)
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


@pytest.mark.parametrize(("vocabulary", "at_once"), [(30, None), (131072, 256)])
def test_no_more_logits_than_were_set_aside_for_exist_at_once(vocabulary, at_once):
    """A caption of a thousand tokens in a large vocabulary would else be half a gigabyte, three times over."""
    hidden, labels = torch.randn(1, 301, 2, requires_grad=True), torch.randint(0, 30, (1, 301))
    head, rows = nn.Linear(2, vocabulary, bias=False), []
    head.register_forward_pre_hook(lambda module, inputs: rows.append(len(inputs[0])))
    losses, _ = supervised_loss(hidden, head, labels)
    losses.sum().backward()
    assert len(losses) == 300
    assert rows == ([300] if at_once is None else [256, 44, 44, 256])  # made again in the backward pass, last chunk first


def test_unsupervised_positions_never_reach_the_head():
    hidden, labels, head = example(share=0.1)
    seen = []
    head.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    _, places = supervised_loss(hidden, head, labels, chunk_tokens=1000)
    assert torch.equal(torch.cat(seen), hidden.flatten(0, 1)[places]) and len(places) < 20


def test_gradients_weighted_by_token_equal_those_written_out():
    """Losses of several sources may count differently; the backward pass must use each position's own weight."""
    hidden, labels, head = example()
    places = (shift_labels(labels).flatten() != IGNORE_INDEX).nonzero().squeeze(-1)
    weights = torch.rand(len(places))
    a, b = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    losses = supervised_loss(a, head, labels, chunk_tokens=5)[0]
    each = F.cross_entropy(head(b.flatten(0, 1)[places]).float(), shift_labels(labels).flatten()[places], reduction="none")
    found = torch.autograd.grad((losses * weights).sum(), [a, head.weight])
    expected = torch.autograd.grad((each * weights).sum(), [b, head.weight])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_huge_logits_give_finite_losses_and_gradients():
    """exp(1000) is infinite; the sums must be made relative to the largest."""
    hidden, head = torch.full((1, 3, 2), 100.0, requires_grad=True), nn.Linear(2, 5, bias=False)
    with torch.no_grad():
        head.weight.copy_(torch.arange(10.0).reshape(5, 2))
    losses, _ = supervised_loss(hidden, head, torch.tensor([[0, 4, 0]]))
    (gradient,) = torch.autograd.grad(losses.sum(), hidden)
    assert losses[0].item() == 0.0 and losses[1].item() == pytest.approx(1600.0) and gradient.isfinite().all()


@pytest.mark.parametrize("chunk_tokens", [7, 1000])
def test_the_short_way_can_be_walked_back_twice(chunk_tokens):
    """A kept softmax that the backward pass overwrote would give the second one other gradients."""
    hidden, labels, head = example()
    losses, _ = supervised_loss(hidden.requires_grad_(), head, labels, chunk_tokens=chunk_tokens)
    first, second = (torch.autograd.grad(losses.sum(), [hidden, head.weight], retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_frozen_head_or_frozen_states_cost_no_gradient():
    """Alignment trains neither: a gradient of the head would be half a gigabyte for nothing."""
    hidden, labels, head = example()
    head.requires_grad_(False)
    supervised_loss(hidden.requires_grad_(), head, labels)[0].sum().backward()
    assert head.weight.grad is None and hidden.grad.any()
    head.requires_grad_(True)
    supervised_loss(hidden.detach(), head, labels)[0].sum().backward()
    assert head.weight.grad.any()


@pytest.mark.parametrize("what", ["plain", "bias", "wrapped", "float32 head under bfloat16"])
@pytest.mark.parametrize("share", [0.9, 0.05, 0.0])
def test_a_head_with_parts_on_other_ranks_is_called_once_however_many_positions_there_are(what, share):
    """Under ZeRO-3 each call gathers its weight, on all ranks: a rank with more answers would wait for one that has none left."""
    hidden, labels, head = example(share=share)
    hidden, head = hidden.float(), nn.Linear(8, 30, bias=what == "bias")
    full = supervised_loss(hidden, Wrapped(head), labels, chunk_tokens=1000)[0].sum()
    expected = torch.autograd.grad(full, head.parameters())
    for parameter in head.parameters():
        parameter.ds_id = 0
    called, calls = Wrapped(head) if what == "wrapped" else head, []
    head.register_forward_hook(lambda *_: calls.append("forwards"))
    head.register_full_backward_pre_hook(lambda *_: calls.append("backwards"))
    hidden.requires_grad_()
    given = hidden.bfloat16() if what.startswith("float32") else hidden
    with torch.autocast("cpu", torch.bfloat16, enabled=what.startswith("float32")):
        loss = supervised_loss(given, called, labels, chunk_tokens=4)[0].sum()
    loss.backward()
    assert calls == ["forwards", "backwards"] and "forward" not in vars(head)
    tolerance = {"rtol": 0.05, "atol": 0.3} if what.startswith("float32") else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(loss, full, **tolerance)
    for parameter, gradient in zip(head.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, **tolerance)


@pytest.mark.parametrize("what", ["hook", "partitioned", "bias", "subclass", "patched", "autocast"])
def test_a_head_that_is_more_than_its_weight_is_called_as_a_module(what):
    """Reading its weight would skip an adapter, a scale, or find an empty tensor where ZeRO-3 has its parts elsewhere."""
    hidden, labels, head = example()
    hidden, head = hidden.float(), head.float()
    if what == "subclass":
        head = type("Scaled", (nn.Linear,), {})(8, 30, bias=False)
    if what == "bias":
        head = nn.Linear(8, 30)
    calls = []
    original = type(head).forward

    def forward(inputs):
        calls.append(len(inputs))
        return original(head, inputs)

    if what == "hook":
        head.register_forward_hook(lambda *_: calls.append(1))
    elif what == "partitioned":
        head.weight.ds_id = 0
    if what in ("partitioned", "bias", "subclass", "autocast"):
        head.weight.register_hook(lambda gradient: calls.append(1))
    if what == "patched":
        head.forward = forward
    from vlm.loss import _is_plain

    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        assert not _is_plain(head, hidden)
        supervised_loss(hidden, head, labels)[0].sum().backward()
    assert calls and _is_plain(nn.Linear(8, 30, bias=False), hidden)


def test_half_precision_gradients_are_near_those_in_float32():
    """The softmax is in float32; only the products are rounded."""
    hidden, labels, head = example()
    expected = torch.autograd.grad(supervised_loss(hidden.requires_grad_(), head, labels)[0].sum(), [hidden, head.weight])
    half = hidden.detach().bfloat16().requires_grad_()
    found = torch.autograd.grad(supervised_loss(half, head.bfloat16(), labels, chunk_tokens=7)[0].sum(), [half, head.weight])
    for one, other in zip(found, expected, strict=True):
        assert (one.double() - other).norm() < 0.02 * other.norm()
