"""A few examples out of many, of every type: what a page shows must not be twenty times the same question."""

import random
from collections import defaultdict
from collections.abc import Callable, Sequence

__all__ = ["spread"]


def spread(items: Sequence, count: int, kind: Callable, seed: int = 0) -> list:
    """`count` of `items` (fewer where there are fewer), drawn in turn from each kind; the same for the same seed."""
    groups = defaultdict(list)
    for item in items:
        groups[str(kind(item))].append(item)
    generator = random.Random(seed)
    queues = [groups[name] for name in sorted(groups)]
    for queue in queues:
        generator.shuffle(queue)
    chosen: list = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop() for queue in queues if queue][: count - len(chosen)]
    return chosen
