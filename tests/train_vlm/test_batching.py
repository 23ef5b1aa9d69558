"""A packed row and its account."""

import pytest
import torch

from train_vlm.batching import MicroBatchPositions, pack
from vlm.loss import IGNORE_INDEX


def sample(ids, learnt, tiles=0, source=0):
    labels = [index if place in learnt else IGNORE_INDEX for place, index in enumerate(ids)]
    pixels = torch.full((tiles, 4, 4, 3), ids[0], dtype=torch.uint8)
    return {"source": source, "id": f"s{ids[0]}", "input_ids": ids, "labels": labels, "pixels": pixels, "tiles_reduced": 1}


SKIPPED = {"source": 1, "id": "bad", "skipped": "broken", "detail": "why"}


def test_samples_stand_end_to_end_with_their_tiles_in_order():
    batch = pack([sample([5, 6, 7], {2}, tiles=2), sample([8, 9], {1}), sample([10], set(), tiles=1)], 2, 4)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 6]
    assert batch["pixels"][:, 0, 0, 0].tolist() == [5, 5, 10] and batch["pixels"].dtype == torch.uint8
    assert batch["labels"].tolist() == [[-100, -100, 7, -100, 9, -100]]


def test_supervised_tokens_are_counted_as_the_loss_counts_them():
    """A first token with a label is nobody's prediction: counted, it would make every step's loss a little too small."""
    assert pack([sample([5, 6], {0, 1}), sample([7, 8], {0, 1})], 2, 4)["supervised_tokens"] == 2


def test_skipped_samples_are_left_out_and_listed():
    batch = pack([SKIPPED, sample([5, 6], {1}), SKIPPED], 2, 4)
    assert batch["input_ids"].tolist() == [[5, 6]] and batch["seen"] == [1, 0, 1] and batch["tiles_reduced"] == 1
    assert batch["skipped"] == [(1, "broken", "bad: why")] * 2


def test_a_batch_without_a_usable_sample_still_runs():
    """Every rank must take part in the step."""
    batch = pack([SKIPPED], 2, 4)
    assert batch["input_ids"].tolist() == [[2]] and batch["supervised_tokens"] == 0 and batch["pixels"].shape == (0, 4, 4, 3)


@pytest.mark.parametrize("ranks, micro_batches", [(1, 1), (2, 1), (2, 2), (4, 1)])
def test_samples_are_dealt_by_cost_without_losing_one(ranks, micro_batches):
    """A rank with all the long samples makes every other rank wait at each step."""
    cost = {position: (position * 7919) % 97 + 1 for position in range(48)}
    readers = [iter(MicroBatchPositions(16, micro_batches, rank, ranks, cost=cost.__getitem__)) for rank in range(ranks)]
    for step in range(3):
        hands = [next(reader) for reader in readers for _ in range(micro_batches)]
        assert sorted(position for hand in hands for position in hand) == list(range(16 * step, 16 * step + 16))
        work = [sum(cost[position] for position in hand) for hand in hands]
        assert max(work) - min(work) <= max(cost.values()) / 2
