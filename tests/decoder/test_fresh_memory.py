"""Fresh memory: what `new_empty` gives, whether or not the system can be asked for large pages."""

import pytest
import torch

from vlm.decoder import fresh_memory
from vlm.decoder.fresh_memory import fresh


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_it_is_a_plain_tensor_of_the_asked_shape(dtype):
    """Large enough to be asked for, at an address that is no multiple of a page."""
    made = fresh(torch.empty(1), 3, 1024, 1031, dtype=dtype)
    assert made.shape == (3, 1024, 1031) and made.dtype == (dtype or torch.float32) and made.is_contiguous()
    assert made.nbytes >= fresh_memory.WORTHWHILE_BYTES
    made.fill_(2.0)
    assert (made == 2.0).all()


def test_only_whole_pages_inside_the_tensor_are_named(monkeypatch):
    """A hint for memory that belongs to somebody else would change that too."""
    asked = []
    monkeypatch.setattr(fresh_memory, "_madvise", lambda: lambda *arguments: asked.append(arguments) or 0)
    made = fresh(torch.empty(1), 2_000_003)
    ((start, length, advice),) = asked
    assert start % 4096 == length % 4096 == 0 and advice == 14
    assert made.data_ptr() <= start < made.data_ptr() + 4096
    assert made.data_ptr() + made.nbytes - 4096 < start + length <= made.data_ptr() + made.nbytes


def test_small_tensors_and_other_devices_are_left_alone(monkeypatch):
    monkeypatch.setattr(fresh_memory, "_madvise", lambda: pytest.fail("asked"))
    assert fresh(torch.empty(1), 1000).shape == (1000,)
    assert fresh(torch.empty(1, device="meta"), 2**24).is_meta


@pytest.mark.parametrize("answer", [None, lambda *_: -1])
def test_a_system_without_large_pages_changes_nothing(monkeypatch, answer):
    monkeypatch.setattr(fresh_memory, "_madvise", lambda: answer)
    assert fresh(torch.empty(1), 2**21).fill_(1.0).sum() == 2**21
