"""Who gets which samples of a step: ranks that finish together, packs that fit.

Every rank waits for the slowest, so a step's samples are dealt by what they cost: the encoder's work for each tile, matrices and scan
for each position, attention for each pair of positions, as flops.py counts them for this model with its parts frozen as they are. Longest
first, each to whoever has least to do (Graham 1969: at most 4/3 of the best possible). Costs come from the shards' indexes, before
anything is read; which samples a step has never depends on them.
"""

import heapq
from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["Dealt", "deal", "deal_in_order", "deal_step", "fewest_micro_batches", "fitting_micro_batches", "imbalance", "predict"]

PREDICTED_STEPS = 100


def deal_in_order(positions: list[int], hands: int) -> list[list[int]]:
    """Equal numbers of samples (within one), as they come."""
    count = len(positions)
    return [positions[hand * count // hands : (hand + 1) * count // hands] for hand in range(hands)]


def deal(
    positions: list[int],
    hands: int,
    cost: Callable[[int], float],
    tokens: Callable[[int], int] | None = None,
    pack_tokens: int | None = None,
) -> list[list[int]]:
    """Positions of a step -> one list for each hand, by cost. With `pack_tokens` a full hand is passed over; when nobody has room for a
    sample, the hand with the fewest tokens takes it."""
    dealt: list[list[int]] = [[] for _ in range(hands)]
    work, held = [0.0] * hands, [0] * hands
    waiting = [(0.0, hand) for hand in range(hands)]
    for position in sorted(positions, key=lambda position: (-cost(position), position)):
        long = tokens(position) if pack_tokens is not None else 0
        passed = []
        while waiting and pack_tokens is not None and held[waiting[0][1]] + long > pack_tokens:
            passed.append(heapq.heappop(waiting))
        if waiting:
            hand = heapq.heappop(waiting)[1]
        else:
            hand = min(range(hands), key=lambda hand: (held[hand], hand))
            passed.remove((work[hand], hand))
        dealt[hand].append(position)
        work[hand] += cost(position)
        held[hand] += long
        for item in [*passed, (work[hand], hand)]:
            heapq.heappush(waiting, item)
    return dealt


def deal_step(
    positions: list[int],
    micro_batches: int,
    ranks: int,
    cost: Callable[[int], float],
    tokens: Callable[[int], int] | None = None,
    pack_tokens: int | None = None,
    *,
    rank_blind: bool = False,
) -> list[list[int]]:
    """A step's positions -> one list for each hand, micro-batch by micro-batch, in each the ranks.

    `rank_blind`: which samples a micro-batch has, all ranks together, follows from the step alone, whatever the number of ranks: what
    BatchNorm wants, which normalises by a micro-batch. Otherwise hands are dealt all at once, which leaves more ways to fit packs."""
    if not rank_blind:
        return deal(positions, micro_batches * ranks, cost, tokens, pack_tokens)
    together = deal_in_order(positions, micro_batches)
    return [hand for part in together for hand in deal(part, ranks, cost, tokens, pack_tokens)]


def imbalance(work: list[float]) -> float:
    """How much more than the mean the slowest has to do, in percent: the share of the others' time that is waiting. 0 for no work."""
    mean = sum(work) / len(work)
    return 100.0 * (max(work) / mean - 1.0) if mean > 0 else 0.0


@dataclass(frozen=True)
class Dealt:
    """What the indexes say about the steps to come: `imbalance` over ranks, dealt by cost and in order, and the longest pack."""

    steps: int
    predicted_percent: float
    in_order_percent: float
    longest_pack_tokens: int

    def text(self, ranks: int) -> str:
        line = f"longest pack {self.longest_pack_tokens:,} tokens"
        if ranks > 1:
            line += (
                f"; the slowest rank has {self.predicted_percent:.1f} % more than the mean to do (dealt in order: "
                f"{self.in_order_percent:.1f} %), predicted"
            )
        return f"{line} over {self.steps} steps"


def predict(
    batch_samples: int,
    micro_batches: int,
    ranks: int,
    cost: Callable[[int], float],
    tokens: Callable[[int], int],
    *,
    pack_tokens: int | None = None,
    rank_blind: bool = False,
    first_step: int = 0,
    steps: int = PREDICTED_STEPS,
) -> Dealt:
    """Deal some steps out, without reading anything."""
    hands, longest, by_cost, in_order = micro_batches * ranks, 0, 0.0, 0.0

    def of_ranks(dealt: list[list[int]]) -> list[float]:
        # hand = micro-batch x ranks + rank (MicroBatchPositions)
        return [sum(cost(position) for hand in dealt[rank::ranks] for position in hand) for rank in range(ranks)]

    for step in range(first_step, first_step + steps):
        positions = list(range(step * batch_samples, (step + 1) * batch_samples))
        dealt = deal_step(positions, micro_batches, ranks, cost, tokens, pack_tokens, rank_blind=rank_blind)
        longest = max(longest, *(sum(map(tokens, hand)) for hand in dealt))
        by_cost += imbalance(of_ranks(dealt)) / steps
        in_order += imbalance(of_ranks(deal_in_order(positions, hands))) / steps
    return Dealt(steps, by_cost, in_order, longest)


def fewest_micro_batches(batch_samples: int, micro_batches: int, ranks: int) -> int:
    """The recipe's number, or where a rank has fewer samples than that as many as it has: a pack without any costs a pass, too."""
    return max(1, min(micro_batches, -(-batch_samples // ranks)))


def fitting_micro_batches(
    batch_samples: int,
    micro_batches: int,
    ranks: int,
    cost: Callable[[int], float],
    tokens: Callable[[int], int],
    *,
    pack_tokens: int,
    steps: int,
    rank_blind: bool = False,
) -> int:
    """The least number of micro-batches, from `fewest_micro_batches` on, with which every pack of the first `steps` steps holds at most
    `pack_tokens`. Raises ValueError when a sample alone is longer."""
    found = fewest_micro_batches(batch_samples, micro_batches, ranks)
    for step in range(steps):
        positions = list(range(step * batch_samples, (step + 1) * batch_samples))
        longest = max(map(tokens, positions))
        if longest > pack_tokens:
            raise ValueError(
                f"data.pack_tokens is {pack_tokens}, a sample of step {step + 1} has {longest} tokens; expected at least as many"
            )
        while any(
            sum(map(tokens, hand)) > pack_tokens
            for hand in deal_step(positions, found, ranks, cost, tokens, pack_tokens, rank_blind=rank_blind)
        ):
            found += 1
    return found
