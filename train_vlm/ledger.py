"""The account of what was read: per source, what was used, what was skipped and why, and a running hash of the stream.

Counts go over all ranks in one small sum each step, and travel with the checkpoint, so that the account of a run killed ten times is that
of a run never killed. A sample that cannot be used is counted and named here; too many of them stop the run.
"""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

from train_vlm.ranks import sum_over_ranks

__all__ = ["COUNTS", "REASONS", "Ledger", "count_batches", "count_over_ranks"]

REASONS = ("broken", "image missing", "too long", "nothing supervised")
COUNTS = ("seen", *REASONS, "tiles_reduced", "supervised_tokens", "tokens", "tiles")
HASH_BITS = 40  # sums of 2**23 of them fit in an int64
EXAMPLES = 3


def count_batches(batches: list[dict], sources: int) -> Tensor:
    """This rank's packed micro-batches -> int64 (sources * len(COUNTS) + 1,), made to be summed over ranks.

    The last number is the sum of the samples' hashes: which samples a step has, whoever read them and in whichever order.
    """
    table = torch.zeros(sources, len(COUNTS), dtype=torch.int64)
    total = 0
    for batch in batches:
        for source in batch["seen"]:
            table[source, 0] += 1
        for source, reason, _ in batch["skipped"]:
            table[source, COUNTS.index(reason)] += 1
        for sample in batch["samples"]:
            table[sample["source"], len(REASONS) + 1 :] += torch.tensor([sample[name] for name in COUNTS[len(REASONS) + 1 :]])
        for name in batch["ids"]:
            total += int.from_bytes(hashlib.blake2b(name.encode(), digest_size=HASH_BITS // 8).digest(), "big")
    return torch.cat([table.flatten(), torch.tensor([total])])


class Ledger:
    """`names`: a name for each source; `left_out`: what never became a sample, per source ({reason: count}), said once at the end."""

    def __init__(self, names: list[str], left_out: list[dict[str, int]] | None = None):
        self.names, self.left_out = names, left_out or [{} for _ in names]
        self.table = torch.zeros(len(names), len(COUNTS), dtype=torch.int64)
        self.examples: dict[str, list[str]] = {}
        self.stream = ""

    def add(self, counts: Tensor) -> int:
        """Enter what `count_batches` gave, summed over ranks. Returns the supervised tokens of the step."""
        rows = counts[:-1].view_as(self.table)
        self.table += rows
        self.stream = hashlib.blake2b(f"{self.stream} {int(counts[-1])}".encode(), digest_size=8).hexdigest()
        return int(rows[:, COUNTS.index("supervised_tokens")].sum())

    def add_examples(self, examples: Iterable[tuple[int, str, str]]) -> None:
        """(source, reason, detail) of skipped samples; the first few of each kind are kept."""
        for source, reason, detail in examples:
            known = self.examples.setdefault(f"{source}: {reason}", [])
            if len(known) < EXAMPLES:
                known.append(detail)

    def __getitem__(self, name: str) -> int:
        """A count over all sources."""
        return int(self.table[:, COUNTS.index(name)].sum())

    @property
    def skipped(self) -> int:
        return sum(self[reason] for reason in REASONS)

    def check(self, most_percent: float, *, least_seen: int = 200) -> None:
        """Raises ValueError with the reasons when too many samples are unusable (after `least_seen`, or when all of 8 are)."""
        skipped, seen = self.skipped, self["seen"]
        enough = 8 if skipped == seen else least_seen
        if seen >= enough and 100.0 * skipped > most_percent * seen:
            reasons = []
            for source, row in enumerate(self.table.tolist()):
                for reason in REASONS:
                    if count := row[COUNTS.index(reason)]:
                        first = self.examples.get(f"{source}: {reason}", ["no example kept"])[0]
                        reasons.append(f"{count} of {self.names[source]} {reason}, e.g. {first}")
            raise ValueError(
                f"{100.0 * skipped / seen:.1f} % of {seen} samples are unusable, at most {most_percent} % are accepted "
                f"(data.max_skipped_percent): {'; '.join(reasons)}"
            )

    def to_dict(self) -> dict:
        """Everything, in JSON's types; `restore` takes it back."""
        sources = [
            {"source": name, **dict(zip(COUNTS, row, strict=True)), "left_out": left_out}
            for name, row, left_out in zip(self.names, self.table.tolist(), self.left_out, strict=True)
        ]
        return {"sources": sources, "examples": self.examples, "stream": self.stream}

    def restore(self, saved: dict) -> "Ledger":
        """Go on from the account of a checkpoint. Raises ValueError when it has other sources."""
        if len(saved["sources"]) != len(self.names):
            raise ValueError(f"the checkpoint's account has {len(saved['sources'])} sources, the recipe {len(self.names)}")
        self.table = torch.tensor([[row[name] for name in COUNTS] for row in saved["sources"]], dtype=torch.int64)
        self.examples, self.stream = {key: list(texts) for key, texts in saved["examples"].items()}, saved["stream"]
        return self

    def rows(self) -> tuple[list[str], list[list]]:
        """Headers and rows of the table at the end of a run."""
        used = [reason for reason in REASONS if self[reason]]
        rest = ["tiles_reduced", "supervised_tokens", "tokens", "tiles"]
        rows = []
        for name, row, left_out in zip(self.names, self.table.tolist(), self.left_out, strict=True):
            counts = dict(zip(COUNTS, row, strict=True))
            rows.append([name, counts["seen"], *(counts[key] for key in used + rest), sum(left_out.values())])
        headers = ["source", "seen", *(f"skipped, {reason}" for reason in used), *(key.replace("_", " ") for key in rest), "never read"]
        return headers, rows

    def text(self) -> str:
        """The table, and an example of each kind of skipped sample, for a terminal."""
        headers, rows = self.rows()
        cells = [headers, *[[f"{cell:,}" if isinstance(cell, int) else cell for cell in row] for row in rows]]
        widths = [max(len(row[column]) for row in cells) for column in range(len(headers))]
        lines = ["  ".join(cell.ljust(width) if column == 0 else cell.rjust(width)
                           for column, (cell, width) in enumerate(zip(row, widths, strict=True))) for row in cells]  # fmt: skip
        for key, texts in sorted(self.examples.items()):
            source, _, reason = key.partition(": ")
            lines.append(f"skipped from {self.names[int(source)]}, {reason}: {texts[0]}")
        for name, left_out in zip(self.names, self.left_out, strict=True):
            lines += [f"never read of {name}: {count:,}, {reason}" for reason, count in left_out.items()]
        return "\n".join(lines)


def count_over_ranks(ledger: Ledger, batches: list[dict], device: torch.device) -> int:
    """Enter what all ranks read, each with its own packs; returns the supervised tokens of all. Every rank calls it."""
    counts = sum_over_ranks(count_batches(batches, len(ledger.names)), device)
    skipped_before, examples = ledger.skipped, [example for batch in batches for example in batch["skipped"]]
    tokens = ledger.add(counts)
    if ledger.skipped > skipped_before:  # the same on all ranks: only then are names worth a second message
        gathered = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(gathered, examples)
        ledger.add_examples(example for part in gathered for example in part)
    return tokens
