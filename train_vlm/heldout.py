"""The loss on samples that are not trained on: the same packs, the same loss, no gradient, nothing left behind.

Every rank reads its share; ranks without a sample left run a blank pack, because under ZeRO-3 each must take part in every forward pass.
Random states are put back afterwards: a run that looks at its held-out loss makes the same steps as one that does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from train_vlm.batching import pack
from train_vlm.checkpointing import random_states, set_random_states
from train_vlm.ranks import sum_over_ranks
from train_vlm.reading import SampleStream
from train_vlm.training_step import forward_inputs, losses_by_source

__all__ = ["heldout_loss", "looking"]


@contextmanager
def looking(model: torch.nn.Module) -> Iterator[None]:
    """Within the block the model is in eval mode; afterwards its modes and all random states are what they were."""
    training = {module: module.training for module in model.modules()}
    states = random_states()
    model.eval()
    try:
        yield
    finally:
        for module, was_training in training.items():
            module.training = was_training
        set_random_states(states)


@torch.no_grad()
def heldout_loss(engine, stream: SampleStream, processor, *, samples: int, pack_samples: int, names: list[str]) -> dict[str, float]:
    """{"heldout_loss": per supervised token, "heldout_loss/NAME": of each source} over the first `samples` positions of a stream.

    `pack_samples`: samples of one forward pass. Every rank calls it.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = engine.module.vision_encoder.weight_dtype
    sums = torch.zeros(2, len(names), dtype=torch.float64)  # losses, supervised tokens
    with looking(engine.module):
        for start in range(0, samples, pack_samples * ranks):
            places = range(start + rank * pack_samples, min(start + (rank + 1) * pack_samples, samples))
            batch = pack([stream[place] for place in places], processor.renderer.end_of_turn_id, processor.image_processor.tile_size)
            output = engine(**forward_inputs(batch, processor, engine.device, dtype), num_items_in_batch=1)
            sums[0] += losses_by_source(output, batch, len(names))
            for sample in batch["samples"]:
                sums[1, sample["source"]] += sample["supervised_tokens"]
    losses, tokens = sum_over_ranks(sums, engine.device)
    result = {"heldout_loss": float(losses.sum() / tokens.sum().clamp(min=1))}
    return result | {f"heldout_loss/{name}": float(loss / count) for name, loss, count in zip(names, losses, tokens, strict=True) if count}
