"""Dealing a step's samples: nothing lost, ranks even, packs within their budget, and the prediction is what happens."""

import pytest
import torch

from train_vlm.batching import MicroBatchPositions
from train_vlm.dealing import deal, deal_in_order, deal_step, fitting_micro_batches, imbalance, predict
from train_vlm.flops import FlopCosts
from train_vlm.preparing import sample_costs
from train_vlm.reading import SampleStream
from train_vlm.recipe import Source


def lengths(count, seed=0):
    """Tokens as in a mixture: most samples short, a few of 13 tiles."""
    generator = torch.Generator().manual_seed(seed)
    draw = torch.rand(count, generator=generator)
    return [int(200 + 3200 * (value > 0.8) + 900 * value) for value in draw.tolist()]


def brute_force(costs, hands):
    """The least possible work of the busiest hand."""
    loads = {(0.0,) * hands}
    for cost in costs:
        loads = {tuple(sorted((*load[:hand], load[hand] + cost, *load[hand + 1 :]))) for load in loads for hand in range(hands)}
    return min(max(load) for load in loads)


@pytest.mark.parametrize("hands", [2, 3])
def test_the_busiest_hand_is_within_a_third_of_the_best_possible(hands):
    """Graham's bound for longest-first; dealing in order breaks it here."""
    for seed in range(20):
        costs = [float(value) for value in lengths(9, seed)]
        dealt = deal(list(range(9)), hands, costs.__getitem__)
        assert sorted(sum(dealt, [])) == list(range(9))
        assert max(sum(costs[place] for place in hand) for hand in dealt) <= (4 / 3 - 1 / (3 * hands)) * brute_force(costs, hands) + 1e-9
    ordered = [float(value) for value in sorted(lengths(9, 1))]
    worst = max(sum(ordered[place] for place in hand) for hand in deal_in_order(list(range(9)), hands))
    assert worst > (4 / 3 - 1 / (3 * hands)) * brute_force(ordered, hands)


def test_a_full_pack_is_passed_over():
    """By cost alone the third sample would go to the cheap hand, whose pack has no room for it."""
    cost, tokens = {0: 10.0, 1: 2.0, 2: 1.0}, {0: 10, 1: 90, 2: 50}
    assert deal([0, 1, 2], 2, cost.__getitem__) == [[0], [1, 2]]
    assert deal([0, 1, 2], 2, cost.__getitem__, tokens.__getitem__, 100) == [[0, 2], [1]]
    assert sorted(sum(deal([0, 1, 2], 1, cost.__getitem__, tokens.__getitem__, 100), [])) == [0, 1, 2]  # nobody has room: nothing is lost


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_micro_batches_grow_until_every_pack_fits(ranks):
    tokens = lengths(40 * 24)
    measured = {"cost": lambda place: float(tokens[place]), "tokens": tokens.__getitem__, "pack_tokens": 8000}
    found = fitting_micro_batches(24, 1, ranks, steps=40, **measured)
    assert found > 1

    def longest(micro):
        hands = [deal(list(range(step * 24, step * 24 + 24)), micro * ranks, *measured.values()) for step in range(40)]
        return max(sum(tokens[place] for place in hand) for dealt in hands for hand in dealt)

    assert longest(found) <= 8000 < longest(found - 1)
    with pytest.raises(ValueError, match="data.pack_tokens is 3000, a sample of step 1 has [0-9]+ tokens"):
        fitting_micro_batches(24, 1, ranks, steps=40, **{**measured, "pack_tokens": 3000})


@pytest.mark.parametrize(("batch", "ranks", "expected"), [(128, 64, 2), (64, 8, 8), (24, 24, 1), (24, 16, 2), (1024, 8, 32)])
def test_there_are_no_more_packs_than_samples_to_begin_with(batch, ranks, expected):
    """A recipe for eight cards on 64: half of its packs would be blank, each of them a pass over all weights."""
    found = fitting_micro_batches(batch, 32, ranks, lambda place: 1.0, lambda place: 10, pack_tokens=10**9, steps=2)
    assert found == expected


def test_imbalance_is_the_waiting_of_the_others():
    assert imbalance([3.0, 1.0]) == pytest.approx(50.0) and imbalance([2.0, 2.0]) == 0.0 and imbalance([0.0, 0.0]) == 0.0


def test_the_prediction_is_what_the_ranks_get():
    """The same steps, dealt by the sampler that feeds the run: predicted imbalance and longest pack are those of its packs."""
    tokens = lengths(24 * 30)
    settings = {"cost": lambda place: float(tokens[place]), "tokens": tokens.__getitem__, "pack_tokens": 9000}
    found = predict(24, 2, 3, settings["cost"], settings["tokens"], pack_tokens=9000, first_step=10, steps=20)
    readers = [iter(MicroBatchPositions(24, 2, rank, 3, 10, **settings)) for rank in range(3)]
    percents, longest = [], 0
    for _ in range(20):
        packs = [[next(reader) for _ in range(2)] for reader in readers]
        work = [[sum(tokens[place] for place in pack) for pack in rank] for rank in packs]
        longest = max(longest, *(count for rank in work for count in rank))
        percents.append(imbalance([sum(rank) for rank in work]))
    assert found.predicted_percent == pytest.approx(sum(percents) / 20) and found.longest_pack_tokens == longest
    assert found.predicted_percent < 0.2 * found.in_order_percent
    assert "dealt in order" in found.text(3) and "slowest" not in found.text(1)


def test_costs_come_from_the_index_and_are_those_of_the_sample(tiny_processor, tmp_path):
    """Encoder, positions and pairs of positions, each with its own price; tiles that the run will not read cost nothing."""
    from planted_faults import plant

    shards, longest = plant(tmp_path, tiny_processor, samples=25, each=5)
    stream = SampleStream((Source(str(shards)),), tiny_processor, seed=0, max_tokens=longest)
    costs = FlopCosts(1e3, 1e2, 10.0, 1.0, 0.5, 7.0)
    cost, tokens = sample_costs(stream, costs)
    kinds = set()
    for position in range(25):
        sample = stream[position]
        if sample.get("skipped") in ("broken", "image missing", "nothing supervised"):
            continue  # the index does not know
        kinds.add(sample.get("skipped", f"{sample['tiles_reduced']} reduced" if "tiles_reduced" in sample else None))
        if "skipped" in sample:
            assert (cost(position), tokens(position)) == (0, 0)
            continue
        count, tiles = len(sample["input_ids"]), len(sample["pixels"])
        supervised = sum(label >= 0 for label in sample["labels"])
        assert tokens(position) == count
        assert cost(position) == pytest.approx(tiles * 1100.0 + count * 11.0 + count * (count + 1) / 2 * 0.5 + supervised * 7.0)
    assert kinds == {"too long", "1 reduced"} or kinds == {"too long", "1 reduced", "0 reduced"}


@pytest.mark.parametrize(("limit", "tiles"), [(None, 7), (6, 7), (2, 3), (1, 1)])
def test_a_source_s_tile_limit_is_in_the_estimate(tiny_processor, tmp_path, limit, tiles):
    from planted_faults import plant

    shards, longest = plant(tmp_path, tiny_processor, samples=10, each=2)
    stream = SampleStream((Source(str(shards), max_tiles=limit),), tiny_processor, seed=0, max_tokens=longest + 1)
    assert max(stream.expected(position)["tiles"] for position in range(10)) == tiles
    assert max(len(stream[position].get("pixels", ())) for position in range(10)) == tiles


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_a_micro_batch_has_the_same_samples_on_any_number_of_ranks_when_it_is_to(ranks):
    """BatchNorm normalises by a micro-batch of all ranks. Dealt all at once, costs decide what it has: other samples on other ranks."""
    costs = lengths(24, seed=7)

    def micro_batches(**how) -> list[list[int]]:
        hands = deal_step(list(range(24)), 3, ranks, costs.__getitem__, **how)
        assert sorted(sum(hands, [])) == list(range(24)) and len(hands) == 3 * ranks
        return [sorted(sum(hands[start : start + ranks], [])) for start in range(0, len(hands), ranks)]

    assert micro_batches(rank_blind=True) == [list(range(8)), list(range(8, 16)), list(range(16, 24))]
    assert micro_batches() != micro_batches(rank_blind=True)
    of_last = iter(MicroBatchPositions(24, 3, ranks - 1, ranks, cost=costs.__getitem__, rank_blind=True))
    expected = deal_step(list(range(24)), 3, ranks, costs.__getitem__, rank_blind=True)
    assert [next(of_last) for _ in range(3)] == expected[ranks - 1 :: ranks]
