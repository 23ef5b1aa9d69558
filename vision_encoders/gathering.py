"""What every rank holds, on every rank: through shared memory within one host (shared_pages.py), by torch.distributed otherwise."""

import weakref

import torch.distributed as dist
from torch import Tensor

from vision_encoders.shared_pages import SharedPages, open_pages

__all__ = ["gather_over_ranks"]

SMALLEST_CAPACITY, LARGEST_CAPACITY = 2**16, 2**25  # bytes a rank; a longer message costs what copying it costs, whoever sends it
_opened: dict[str, object] = {"group": None, "pages": None}


def gather_over_ranks(own: Tensor) -> Tensor:
    """own (n,), as long, of the same dtype and on the same kind of device on every rank of the default process group -> (R, n), in the
    order of the ranks, the same on each. Every rank calls it."""
    ranks = dist.get_world_size()
    if ranks == 1:
        return own.detach().clone()[None]
    if pages := _pages_for(own):
        return pages.gather(own)
    every = own.new_empty(ranks, len(own))
    dist.all_gather(list(every.unbind(0)), own.detach().contiguous())
    return every


def _pages_for(own: Tensor) -> SharedPages | None:
    size = own.numel() * own.element_size()
    if own.device.type != "cpu" or size > LARGEST_CAPACITY:
        return None
    group, pages = _opened["group"], _opened["pages"]
    is_new = group is None or group() is not dist.group.WORLD  # the first message of a process group, or of a later one
    if is_new or (pages is not None and size > pages.capacity):
        if pages is not None:
            pages.close()
        capacity = SMALLEST_CAPACITY if is_new else 2 * pages.capacity
        _opened.update(group=weakref.ref(dist.group.WORLD), pages=open_pages(max(capacity, size)))
    return _opened["pages"]
