"""What a run costs and yields, over the steps since the last line of the log: losses per source, speed of real work, MFU, waiting, memory.

Real work is what the samples ask for: positions and tiles of packs, none of them padding; operations as flops.py counts them. Collecting
is a few additions a step; what needs the other ranks is asked for once a line.
"""

import resource
import sys
import time

import torch
from torch import Tensor

from train_vlm.dealing import imbalance
from train_vlm.flops import FlopCosts, known_peak, measure_peak

__all__ = ["Accounts", "memory_bytes", "peak_of", "source_names"]


def source_names(folders: list) -> list[str]:
    """A short name for each source: its folder's, with a number where two are alike."""
    names: list[str] = []
    for folder in folders:
        name, number = folder.name, 2
        while name in names:
            name, number = f"{folder.name}-{number}", number + 1
        names.append(name)
    return names


def memory_bytes(device: torch.device) -> int:
    """The largest memory this process has held: of its device, or of the machine when there is none."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def peak_of(device: torch.device, precision: str, peak_teraflops: float | None, *, has_fp8: bool = False) -> tuple[float, str]:
    """FLOP per second that one rank could reach, and where the figure comes from.

    Of a run with FP8 layers it is still the peak of `precision`, in words, too: only some of its products are in FP8, and which ones may
    change on the way (fp8_guard.py), so that no peak is that of all of them.
    """
    words = "; not that of FP8, though the products in FP8 count with all others" if has_fp8 else ""
    if peak_teraflops is not None:
        return peak_teraflops * 1e12, f"run.peak_teraflops{', for products in FP8 and all others' if has_fp8 else ''}"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        if known := known_peak(name, precision):
            return known, f"{name}, {precision}{words}"
    dtype = torch.bfloat16 if precision == "bfloat16" else torch.float32
    return measure_peak(device, dtype), f"a product of matrices on this {device.type}, {precision}, measured{words}"


class Accounts:
    """`add` after every step, `line` on every rank when a line is due. peak: FLOP per second of one rank."""

    def __init__(self, sources: list[str], costs: FlopCosts, peak: float, device: torch.device):
        self.sources, self.costs, self.peak, self.device = sources, costs, peak, device
        self._reset()

    def _reset(self) -> None:
        self.began, self.steps, self.paused = time.monotonic(), 0, 0.0
        self.losses = torch.zeros(len(self.sources), dtype=torch.float64)
        self.counts: Tensor | None = None
        self.flops = self.waiting = 0.0
        self.work: list[tuple[float, float]] = []  # of each step: operations and seconds of forward passes on this rank

    def pause(self, seconds: float) -> None:
        """Time that was no training: saving, looking at the held-out loss."""
        self.paused += seconds

    def add(self, batches: list[dict], source_losses: Tensor, waiting_seconds: float, forward_seconds: float = 0.0) -> None:
        """This rank's packs of a step, the step's losses per source over all ranks, and this rank's seconds of waiting for data and in
        forward passes."""
        self.steps += 1
        self.losses += source_losses
        self.waiting += waiting_seconds
        flops = sum(self.costs.step(batch["samples"]) for batch in batches)
        self.flops += flops
        self.work.append((flops, forward_seconds))

    def line(self, table_before: Tensor, table_now: Tensor, columns: list[str]) -> dict:
        """The accounts since the last line; `table_*`: the ledger's counts (sources, columns) then and now. Every rank calls it."""
        ranks = torch.distributed.get_world_size()
        own = [self.flops, self.waiting, memory_bytes(self.device), *(value for step in self.work for value in step)]
        own = torch.tensor(own, dtype=torch.float64, device=self.device)
        everyone = [torch.empty_like(own) for _ in range(ranks)]
        torch.distributed.all_gather(everyone, own)
        everyone = torch.stack(everyone).cpu()
        flops, waiting, memory = everyone[:, :3].unbind(1)
        seconds = max(time.monotonic() - self.began - self.paused, 1e-9)
        new = dict(zip(columns, (table_now - table_before).double().unbind(1), strict=True))
        supervised = new["supervised_tokens"]
        values = {f"loss/{name}": float(loss / count) for name, loss, count in zip(self.sources, self.losses, supervised, strict=True)
                  if count > 0}  # fmt: skip
        values |= {
            "tokens_per_second": round(float(new["tokens"].sum()) / seconds, 1),
            "tiles_per_second": round(float(new["tiles"].sum()) / seconds, 2),
            "mfu_percent": round(100.0 * float(flops.sum()) / seconds / (self.peak * ranks), 2),
            "waiting_percent": round(100.0 * float(waiting.max()) / seconds, 2),
            "memory_gb": round(float(memory.max()) / 2**30, 3),
            "mean_step_seconds": round(seconds / max(self.steps, 1), 4),
        }
        if ranks > 1 and self.work:
            values |= _imbalances(everyone[:, 3:].view(ranks, len(self.work), 2))
        self._reset()
        return values


def _imbalances(work: Tensor) -> dict[str, float]:
    """work (ranks, steps, 2): operations and forward seconds -> how much more than the mean the slowest rank had, mean over the steps."""
    operations, seconds = (sum(imbalance(step) for step in work[:, :, kind].T.tolist()) / work.shape[1] for kind in range(2))
    values = {"imbalance_work_percent": round(operations, 2)}
    return values | ({"imbalance_seconds_percent": round(seconds, 2)} if work[:, :, 1].any() else {})
