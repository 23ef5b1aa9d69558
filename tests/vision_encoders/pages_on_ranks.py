"""What three ranks hear of each other through shared pages: started by test_gathering.py, writes what each saw as JSON.

python -m torch.distributed.run --nproc_per_node 3 pages_on_ranks.py OUT
"""

import json
import os
import random
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from vision_encoders import gathering, shared_pages
from vision_encoders.gathering import gather_over_ranks

groups: list[str] = []


def message(number: int, rank: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    return (torch.arange(size) * (rank + 1) + 7 * number).to(dtype)


def same(number: int, size: int, dtype: torch.dtype) -> bool:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    heard = gather_over_ranks(message(number, rank, size, dtype))
    return heard.dtype == dtype and torch.equal(heard, torch.stack([message(number, each, size, dtype) for each in range(ranks)]))


def start_anew() -> None:
    """A process group of its own, which meets through a file of its own."""
    if dist.is_initialized():
        dist.destroy_process_group()
    groups.append(f"file://{sys.argv[1]}.group{len(groups)}")
    dist.init_process_group("gloo", init_method=groups[-1], rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))


def with_pages() -> dict:
    together, alone = random.Random(0), random.Random(100 + dist.get_rank())
    found = {"many": True}
    for number in range(3000):  # each rank at its own pace; now ahead, now behind
        if alone.random() < 0.02:
            time.sleep(alone.random() * 0.002)
        size = together.choice([1, 3, 8, 200, 1000])
        found["many"] &= same(number, size, together.choice([torch.float64, torch.float32, torch.bfloat16, torch.int64, torch.uint8]))
    first = gathering._opened["pages"]
    found |= {"has_pages": first is not None, "empty": same(0, 0, torch.float32)}
    found["longer"] = same(1, 300_000, torch.float64) and same(2, 5, torch.float32)
    found["grew"] = gathering._opened["pages"] is not first
    kept = gather_over_ranks(message(3, dist.get_rank(), 4, torch.float32))
    before = kept.clone()
    for number in range(10, 14):  # other messages into both places
        gather_over_ranks(message(number, dist.get_rank(), 4, torch.float32))
    found["kept"] = torch.equal(kept, before)
    parameter = torch.nn.Parameter(torch.ones(6)[::2] * dist.get_rank())
    found["apart"] = gather_over_ranks(parameter).tolist() == [[float(each)] * 3 for each in range(dist.get_world_size())]
    # A late rank: the others fall asleep and are there again.
    if dist.get_rank() == 0:
        time.sleep(0.2)
    found["late"] = same(5, 7, torch.float32)
    return found


def without(reason: str) -> bool:
    """The same through torch.distributed, when one rank of three cannot have pages."""
    kept = shared_pages.platform.machine, os.memfd_create, os.open
    start_anew()
    if reason == "processor" and dist.get_rank() == 1:
        shared_pages.platform.machine = lambda: "aarch64"
    if reason == "memory" and dist.get_rank() == 0:
        os.memfd_create = _refuse
    if reason == "look" and dist.get_rank() == 2:
        os.open = _refuse
    heard = same(0, 9, torch.float32)
    shared_pages.platform.machine, os.memfd_create, os.open = kept
    return heard and gathering._opened["pages"] is None and same(1, 9, torch.float64)


def _refuse(*arguments, **settings):
    raise PermissionError(1, "refused")


def another_host() -> bool:
    """A descriptor of that number exists on this host, too, but is something else."""
    start_anew()
    kept = shared_pages.dist.broadcast_object_list

    def told_elsewhere(told, source):
        kept(told, source)
        if dist.get_rank():
            told[0] = (*told[0][:2], b"another host's...")

    shared_pages.dist.broadcast_object_list = told_elsewhere
    heard = same(0, 9, torch.float32)
    shared_pages.dist.broadcast_object_list = kept
    return heard and gathering._opened["pages"] is None


def main() -> None:
    start_anew()
    found = with_pages() | {reason: without(reason) for reason in ("processor", "memory", "look")} | {"another_host": another_host()}
    start_anew()
    found["again"] = same(0, 9, torch.float32) and gathering._opened["pages"] is not None
    out = Path(sys.argv[1])
    every: list = [None] * dist.get_world_size()
    dist.all_gather_object(every, found)
    if dist.get_rank() == 0:
        out.write_text(json.dumps(every))
    dist.barrier()
    if dist.get_rank() == 2:
        os._exit(0)  # a rank that goes without a word
    try:
        gather_over_ranks(torch.zeros(3))
    except RuntimeError as error:
        out.with_suffix(f".{dist.get_rank()}").write_text(str(error))
    os._exit(0)


if __name__ == "__main__":
    main()
