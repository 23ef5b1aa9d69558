"""The loss on samples that are not trained on: the same packs, the same loss, no gradient, nothing left behind.

Each sample is read once at most, and one that cannot be used is counted by its reason, as those of the training are. Every rank reads its
share; ranks without a sample left run a blank pack, because under ZeRO-3 each must take part in every forward pass.
Random states are put back afterwards: a run that looks at its held-out loss makes the same steps as one that does not.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from train_vlm.accounts import source_names
from train_vlm.batching import pack
from train_vlm.checkpointing import random_states, set_random_states
from train_vlm.ledger import COUNTS, REASONS, Ledger, count_over_ranks
from train_vlm.ranks import sum_over_ranks
from train_vlm.reading import SampleStream
from train_vlm.training_step import forward_inputs, losses_by_source

__all__ = ["heldout_loss", "heldout_words", "looking"]


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
def heldout_loss(engine, stream: SampleStream, processor, *, samples: int, pack_samples: int) -> tuple[dict[str, float], Ledger]:
    """The loss over the first `samples` samples of a stream, each once: fewer when its sources have fewer.

    `pack_samples`: samples of one forward pass. Every rank calls it. Returns {"heldout_loss": per supervised token, "heldout_loss/NAME": of
    each source, "heldout_samples": used, "heldout_skipped": unusable} (no loss where no sample was usable), and the account by source.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    dtype = engine.module.vision_encoder.weight_dtype
    ledger = Ledger(source_names([source.folder for source in stream.sources]), [source.never_read() for source in stream.sources])
    losses, places = torch.zeros(len(ledger.names), dtype=torch.float64), stream.once(samples)
    with looking(engine.module):
        for start in range(0, len(places), pack_samples * ranks):
            own = places[start + rank * pack_samples : start + (rank + 1) * pack_samples]
            batch = pack([stream.sample(*place) for place in own], processor.renderer.end_of_turn_id, processor.image_processor.tile_size)
            output = engine(**forward_inputs(batch, processor, engine.device, dtype), num_items_in_batch=1)
            losses += losses_by_source(output, batch, len(ledger.names))
            count_over_ranks(ledger, [batch], engine.device)
    losses, tokens = sum_over_ranks(losses, engine.device), ledger.table[:, COUNTS.index("supervised_tokens")]
    figures = {"heldout_loss": float(losses.sum() / tokens.sum())} if tokens.any() else {}
    figures |= {
        f"heldout_loss/{name}": float(loss / count) for name, loss, count in zip(ledger.names, losses, tokens, strict=True) if count
    }
    return figures | {"heldout_samples": ledger["seen"] - ledger.skipped, "heldout_skipped": ledger.skipped}, ledger


def heldout_words(figures: dict[str, float], account: dict) -> str:
    """One line of what `heldout_loss` found, for a terminal. account: the ledger as JSON (`Ledger.to_dict`)."""
    reasons = {reason: sum(row[reason] for row in account["sources"]) for reason in REASONS}
    skipped = ", ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
    loss = f"{figures['heldout_loss']:.3f}" if "heldout_loss" in figures else "not measured"
    read = figures["heldout_samples"] + figures["heldout_skipped"]
    return f"held-out loss {loss}: {figures['heldout_samples']} of {read} samples used{f', skipped: {skipped}' if skipped else ''}"
