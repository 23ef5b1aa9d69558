"""Samples -> one packed row, and which positions of the stream each rank reads at each step.

Packing leaves no padding: samples stand end to end, and `lengths` tells the decoder where each begins, so that no state and no attention
crosses a border.

Letters: T positions of the packed row, N tiles.
"""

from collections.abc import Callable

import torch

from train_vlm.dealing import deal_in_order, deal_step
from vlm.loss import IGNORE_INDEX, count_supervised_tokens

__all__ = ["MicroBatchPositions", "pack"]


def pack(samples: list[dict], filler_id: int, tile_size: int) -> dict:
    """Samples of `SampleStream` -> input_ids and labels (1, T), pixels uint8 (N, H, W, 3), cu_seq_lens_q (S + 1,), and their account.

    The account: `samples`, what each usable one has ("source", "id", "tokens", "supervised_tokens", "tiles", "tiles_reduced"), in order;
    `ids` and `seen`, ids and sources of all of them; `skipped`: (source, reason, detail). Skipped samples are left out and listed. If
    none is usable, one filler token without a label stands in, so that every rank still runs.
    """
    usable = [sample for sample in samples if "skipped" not in sample]
    ids = [sample["input_ids"] for sample in usable] or [[filler_id]]
    labels = [sample["labels"] for sample in usable] or [[IGNORE_INDEX]]
    lengths = torch.tensor([0, *(len(row) for row in ids)])
    seq_idx = torch.arange(len(ids)).repeat_interleave(lengths[1:])[None]
    packed_labels = torch.tensor([label for row in labels for label in row])[None]
    pixels = [sample["pixels"] for sample in usable if len(sample["pixels"])]
    return {
        "input_ids": torch.tensor([index for row in ids for index in row])[None],
        "labels": packed_labels,
        "cu_seq_lens_q": lengths.cumsum(0),
        "pixels": torch.cat(pixels) if pixels else torch.zeros(0, tile_size, tile_size, 3, dtype=torch.uint8),
        "supervised_tokens": count_supervised_tokens(packed_labels, seq_idx),
        "samples": [_account(sample) for sample in usable],
        "ids": [f"{sample['source']} {sample['id']}" for sample in samples],
        "seen": [sample["source"] for sample in samples],
        "skipped": [
            (sample["source"], sample["skipped"], f"{sample['id']}: {sample['detail']}") for sample in samples if "skipped" in sample
        ],
        "tiles_reduced": sum(sample["tiles_reduced"] for sample in usable),
    }


def _account(sample: dict) -> dict:
    return {
        "source": sample["source"],
        "id": sample["id"],
        "tokens": len(sample["input_ids"]),
        "supervised_tokens": sum(label != IGNORE_INDEX for label in sample["labels"][1:]),  # nothing predicts the first token
        "tiles": len(sample["pixels"]),
        "tiles_reduced": sample["tiles_reduced"],
    }


class MicroBatchPositions(torch.utils.data.Sampler):
    """Endless: the stream positions of this rank's micro-batches, in order. Step s takes positions [s * batch, (s + 1) * batch).

    With `cost` (position -> work) a step's samples are dealt out so that ranks finish together, and with `tokens` and `pack_tokens` so that
    no pack is longer (dealing.py). Which samples a step has does not depend on it; which ones a micro-batch has, all ranks together, does
    not depend on the number of ranks with `rank_blind`, or without `cost`.
    """

    def __init__(
        self,
        batch_samples: int,
        micro_batches: int,
        rank: int,
        world_size: int,
        first_step: int = 0,
        cost: Callable[[int], float] | None = None,
        tokens: Callable[[int], int] | None = None,
        pack_tokens: int | None = None,
        rank_blind: bool = False,
    ):
        self.rank_blind = rank_blind
        self.batch_samples, self.micro_batches, self.cost, self.tokens = batch_samples, micro_batches, cost, tokens
        self.rank, self.world_size, self.first_step, self.pack_tokens = rank, world_size, first_step, pack_tokens

    def __iter__(self):
        hands = self.micro_batches * self.world_size
        step = self.first_step
        while True:
            positions = list(range(step * self.batch_samples, (step + 1) * self.batch_samples))
            if self.cost is None:
                dealt = deal_in_order(positions, hands)
            else:
                dealt = deal_step(
                    positions, self.micro_batches, self.world_size, self.cost, self.tokens, self.pack_tokens, rank_blind=self.rank_blind
                )
            for micro in range(self.micro_batches):
                yield dealt[micro * self.world_size + self.rank]
            step += 1
