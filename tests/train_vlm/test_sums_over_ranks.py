"""What ranks add up and hear of the first, without any: the gathering itself is tested in tests/vision_encoders/test_gathering.py."""

import pytest
import torch

from train_vlm import progress, ranks


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_a_sum_over_ranks_keeps_shape_and_dtype(monkeypatch, dtype, shape):
    """torch adds int32 up to int64; a count of one kind would meet one of another."""
    monkeypatch.setattr(ranks, "gather_over_ranks", lambda own: torch.stack([own, 2 * own, 4 * own]))
    given = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=dtype).view(shape)
    found = ranks.sum_over_ranks(given, torch.device("cpu"))
    assert found.dtype == dtype and torch.equal(found, 7 * given)


def test_the_first_rank_s_clock_is_everyone_s(monkeypatch):
    """The last step of a run in minutes must be the same one on every rank."""
    monkeypatch.setattr(progress, "gather_over_ranks", lambda own: torch.tensor([[0.5], [0.75]], dtype=own.dtype))
    assert progress.share_from_first_rank(0.75, torch.device("cpu")) == 0.5
