"""What a run keeps in memory from step to step, per rank, for each way ZeRO can share it out; counted from parameters, not measured.

A frozen parameter is its weight. One that trains costs, under bfloat16 (Rajbhandari et al. 2020, arXiv 1910.02054, section 3, with the sums
of gradients in float32 as our DeepSpeed settings have them): 2 bytes of weight, 4 of gradient, and 12 of optimizer (a float32 copy and
AdamW's two moments). In float32 it is 4, 4 and 8. ZeRO 1 shares the optimizer out over the ranks, 2 the gradients too, 3 all weights;
offloading puts optimizer and shared gradients, and with "all" the weights, into the machine's memory.

Beside it: the inputs of blocks that activation checkpointing keeps, and under ZeRO-3 the weights gathered for the blocks at work. Not
here, but for the reserve taken off every card: activations inside a block, communication buffers, CUDA's own memory.

At the start the whole model is read on every machine, as pages of its files that the ranks share where nothing has to be cast; onto the
cards it goes parameter by parameter (engine_start.py).
"""

from dataclasses import dataclass

__all__ = ["CARDS_GB", "GIB", "MemoryRow", "cards_that_fit", "checkpoint_bytes", "memory_rows", "moved_bytes"]

GIB = 2**30
CARDS_GB = (24, 40, 48, 80, 141)  # a card of N GB counts as N x 10^9 bytes; it has some 6 % more
RESERVE_BYTES = 2 * GIB  # CUDA's context, DeepSpeed's buckets of 5 x 10^8 elements
GATHERED_PARAMETERS = 10**9  # DeepSpeed's stage3_max_live_parameters
WAYS = ((0, None), (1, None), (2, None), (3, None), (1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "all"))


@dataclass(frozen=True)
class MemoryRow:
    """Bytes of one rank: weights, gradients and optimizer on its card, gathered weights, and host: what is offloaded. whole: the model's
    weights, which are read at the start."""

    zero_stage: int
    offload: str | None
    weights: float
    gradients: float
    optimizer: float
    gathered: float
    host: float
    whole: float = 0.0

    @property
    def card(self) -> float:
        return self.weights + self.gradients + self.optimizer + self.gathered

    @property
    def name(self) -> str:
        return f"ZeRO {self.zero_stage}" + (f", {self.offload} offloaded" if self.offload else "")


def bytes_of_training(precision: str, kind: str = "adamw") -> tuple[int, int, int]:
    """Bytes of weight, gradient and optimizer for a parameter that trains."""
    weight, moments = (2, 12) if precision == "bfloat16" else (4, 8)
    return weight, 4, moments - (4 if kind == "muon" else 0)  # Muon keeps one moment; its few AdamW parameters are neglected


def checkpoint_bytes(trained: int, *, precision: str = "bfloat16", kind: str = "adamw") -> float:
    """On disk: weights that train and the optimizer's states, of all ranks together."""
    weight, _, optimizer = bytes_of_training(precision, kind)
    return float(trained) * (weight + optimizer)


def moved_bytes(trained: int, frozen: int, *, precision: str = "bfloat16") -> float:
    """Under ZeRO-3, through one rank's network for one pack: all weights gathered forwards and again backwards, gradients summed up."""
    weight = bytes_of_training(precision)[0]
    return weight * (2.0 * (trained + frozen) + trained)


def memory_rows(trained: int, frozen: int, ranks: int, *, precision: str = "bfloat16", kind: str = "adamw") -> list[MemoryRow]:
    """A row for each way to share `trained` and `frozen` parameters out over `ranks`."""
    weight, gradient, optimizer = bytes_of_training(precision, kind)
    rows = []
    for stage, offload in WAYS:
        if (precision == "bfloat16" and stage == 0) or (kind == "muon" and stage > 0):
            continue  # the recipe refuses these
        weights = weight * (trained + frozen) / (ranks if stage == 3 else 1)
        gradients = gradient * trained / (ranks if stage >= 2 else 1)
        states = optimizer * trained / (ranks if stage >= 1 else 1)
        gathered = weight * min(GATHERED_PARAMETERS, trained + frozen) if stage == 3 and (ranks > 1 or offload == "all") else 0.0
        host = 0.0
        if offload:
            host, states = states, 0.0
            if stage >= 2:
                host, gradients = host + gradients, 0.0
            else:
                host += gradient * trained / ranks
            if offload == "all":
                host, weights = host + weights, 0.0
        rows.append(MemoryRow(stage, offload, weights, gradients, states, gathered, host, weight * (trained + frozen)))
    return rows


def cards_that_fit(row: MemoryRow, activations: float) -> list[int]:
    """The sizes of card (GB) on which a rank's part, `activations` bytes beside it, and the reserve have room."""
    return [size for size in CARDS_GB if row.card + activations + RESERVE_BYTES <= size * 1e9]
