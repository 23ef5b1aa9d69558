"""What a run tells: a bar with loss, rate and time left, a JSON line a step, TensorBoard, and the account of what was read.

Only rank 0 writes. Files: `log.jsonl` (a line each logged step), `tensorboard/`, `summary.json` at the end.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

from tqdm import tqdm

from vlm.files import write_whole

__all__ = ["Ledger", "RunLog"]


class Ledger:
    """Samples seen and skipped per source and reason, over all ranks."""

    def __init__(self):
        self.seen, self.skipped, self.examples, self.tiles_reduced = Counter(), Counter(), {}, 0

    def add(self, batch: dict) -> None:
        self.seen.update(batch["seen"])
        self.tiles_reduced += batch["tiles_reduced"]
        for source, reason, detail in batch["skipped"]:
            self.skipped[(source, reason)] += 1
            self.examples.setdefault((source, reason), detail)

    def skipped_percent(self) -> float:
        return 100.0 * self.skipped.total() / max(self.seen.total(), 1)

    def check(self, most_percent: float, *, least_seen: int = 200) -> None:
        """Raises ValueError with the reasons when too many samples are unusable (after `least_seen`, or when all of 8 are)."""
        enough = 8 if self.skipped.total() == self.seen.total() else least_seen
        if self.seen.total() >= enough and self.skipped_percent() > most_percent:
            raise ValueError(
                f"{self.skipped_percent():.1f} % of {self.seen.total()} samples are unusable, at most {most_percent} % are accepted "
                f"(data.max_skipped_percent): " + "; ".join(f"{count} {reason}, e.g. {self.examples[(source, reason)]}"
                                                            for (source, reason), count in self.skipped.items())
            )  # fmt: skip

    def to_dict(self) -> dict:
        return {
            "seen": {str(source): count for source, count in sorted(self.seen.items())},
            "skipped": {f"{source}: {reason}": count for (source, reason), count in sorted(self.skipped.items())},
            "examples": {f"{source}: {reason}": text for (source, reason), text in self.examples.items()},
            "tiles_reduced": self.tiles_reduced,
        }


class RunLog:
    """Opened by rank 0 with the run's folder; other ranks pass folder=None and every call does nothing."""

    def __init__(self, folder: Path | None, total_steps: int | None, title: str):
        self.folder, self.started, self.bar, self.writer, self.file = folder, time.monotonic(), None, None, None
        if folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        folder.mkdir(parents=True, exist_ok=True)
        self.file = open(folder / "log.jsonl", "w", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
        self.writer = SummaryWriter(str(folder / "tensorboard"))
        # In a file or a pipe a bar is a line each time: once in half a minute is enough.
        self.bar = tqdm(total=total_steps, desc=title, unit="step", mininterval=1.0 if sys.stderr.isatty() else 30.0, dynamic_ncols=True)

    def set_total(self, steps: int) -> None:
        if self.bar is not None:
            self.bar.total = steps
            self.bar.refresh()

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def record(self, step: int, values: dict) -> None:
        if self.folder is None:
            return
        self.file.write(json.dumps({"step": step, "seconds": round(time.monotonic() - self.started, 2), **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)
        rate = max(value for name, value in values.items() if name.startswith("lr/"))
        self.bar.set_postfix_str(f"loss {values['loss']:.3f}, rate {rate:.1e}", refresh=False)

    def close(self, summary: dict | None = None) -> None:
        if self.folder is None:
            return
        self.bar.close()
        self.writer.close()
        self.file.close()
        if summary is not None:
            write_whole(self.folder / "summary.json", json.dumps(summary, indent=1))
