"""Fresh memory: what `new_empty` gives, in large pages, and used again only when nobody can see it any more."""

import gc
import mmap
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vlm.decoder import fresh_memory
from vlm.decoder.fresh_memory import PAGE_BYTES, fresh

LARGE = 2**21  # float32: 8 MB


@pytest.fixture(autouse=True)
def no_idle_pieces():
    gc.collect()
    fresh_memory.IDLE.pieces.clear()
    yield
    fresh_memory.IDLE.pieces.clear()


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_is_a_plain_tensor_of_the_asked_shape(dtype):
    made = fresh(torch.empty(1), 3, 1024, 1031, dtype=dtype)
    assert made.shape == (3, 1024, 1031) and made.dtype == (dtype or torch.float32) and made.is_contiguous()
    assert made.nbytes >= fresh_memory.WORTHWHILE_BYTES and made.untyped_storage().nbytes() == made.nbytes
    assert not made._is_view() and not made.requires_grad
    assert made.data_ptr() % PAGE_BYTES == 0
    made.fill_(2.0)
    assert (made == 2.0).all()


def test_memory_of_a_tensor_that_is_gone_serves_the_next_one():
    """Also one that is a little smaller, but not one that is much smaller."""
    first = fresh(torch.empty(1), LARGE)
    address = first.data_ptr()
    del first
    again = fresh(torch.empty(1), LARGE - 1000)
    assert again.data_ptr() == address and not fresh_memory.IDLE.pieces
    del again
    assert fresh(torch.empty(1), LARGE // 2 - 5).data_ptr() != address


def test_nothing_is_used_again_while_a_view_or_a_graph_can_see_it():
    """The fault this would plant: a tensor kept for the backward pass changes under it."""
    made = fresh(torch.empty(1), LARGE).fill_(3.0)
    view = made[5:10]
    weight = torch.ones(1, requires_grad=True)
    product = made * weight  # keeps `made` for the backward pass
    del made
    other = fresh(torch.empty(1), LARGE).fill_(7.0)
    assert (view == 3.0).all() and not fresh_memory.IDLE.pieces
    del view
    assert not fresh_memory.IDLE.pieces
    product.sum().backward()
    assert weight.grad.item() == pytest.approx(3.0 * LARGE)
    del product
    gc.collect()
    assert len(fresh_memory.IDLE.pieces) == 1
    del other
    assert len(fresh_memory.IDLE.pieces) == 2


def test_a_result_of_a_function_may_be_changed_in_place():
    """A view made inside an autograd function could not be."""

    class Twice(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return torch.mul(x, 2.0, out=fresh(x, *x.shape))

        @staticmethod
        def backward(ctx, grad):
            return torch.mul(grad, 2.0, out=fresh(grad, *grad.shape))

    x = torch.ones(LARGE, requires_grad=True)
    y = Twice.apply(x)
    y += 1.0
    y.sum().backward()
    assert (x.grad == 2.0).all() and (y == 3.0).all()


def test_what_waits_is_bounded_and_the_oldest_goes_first(monkeypatch):
    monkeypatch.setattr(fresh_memory, "MOST_IDLE_BYTES", 40 * 2**20)
    made = [fresh(torch.empty(1), LARGE) for _ in range(6)]  # 8 + 2 MB each
    pieces = [tensor.data_ptr() for tensor in made]
    while made:
        made.pop(0)
    assert len(fresh_memory.IDLE.pieces) == 4
    assert fresh(torch.empty(1), LARGE).data_ptr() in pieces[2:]


def test_threads_never_share_a_piece():
    wrong = []

    def work(number: int) -> None:
        for _ in range(60):
            mine = fresh(torch.empty(1), LARGE // 2).fill_(number)
            if not (mine[::4096] == number).all():
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(fresh_memory.IDLE.pieces) <= 8  # each thread has one in hand while it asks for the next


def test_small_tensors_other_devices_and_traced_ones_are_left_alone(monkeypatch):
    monkeypatch.setattr(fresh_memory, "_pooled", lambda *_: pytest.fail("pooled"))
    assert fresh(torch.empty(1), 1000).shape == (1000,)
    assert fresh(torch.empty(1, device="meta"), 2**24).is_meta
    with FakeTensorMode():
        assert fresh(torch.empty(1), LARGE).shape == (LARGE,)


def test_a_system_without_large_pages_changes_nothing(monkeypatch):
    monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    assert fresh(torch.empty(1), LARGE).fill_(1.0).sum() == LARGE


def test_without_memory_what_waits_is_given_back_and_torch_is_asked(monkeypatch):
    kept = fresh(torch.empty(1), LARGE)
    del kept

    def none_left(size):
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(fresh_memory, "_piece", none_left)
    assert fresh(torch.empty(1), LARGE).shape == (LARGE,)
    assert not fresh_memory.IDLE.pieces
