"""On a GPU: a decoding step captured as a CUDA graph, because a step of a small batch is mostly the launching of its hundreds of kernels.

A graph is made for each size of batch (powers of two) and stretch of slots (multiples of 512); rows beyond the running ones compute on
rows nobody uses. Whether that pays is measured each time: a graph whose replay is no faster than the step as it is - whose rows are mostly
nobody's, or so many that the device is the slower one - is given up. What cannot be captured (a mixture of experts picks its experts on the
host) runs as it is, and `reason` says why.
"""

import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from ..decoder.serving import ServingDecoder
from ..decoder.slots import Slots

__all__ = ["DecodeGraphs"]

MOST_GRAPHS = 16
STRETCH = 512
TIMED_RUNS = 2  # of each way; the faster one counts


def seconds_of(act: Callable[[], object]) -> float:
    """From the call to the end of the device's work: what whoever waits for the next token sees."""
    best = float("inf")
    for _ in range(TIMED_RUNS):
        torch.cuda.synchronize()
        began = time.perf_counter()
        act()
        torch.cuda.synchronize()
        best = min(best, time.perf_counter() - began)
    return best


@contextmanager
def _states_as_they_were(decoder: ServingDecoder, slots: Slots, rows: int) -> Iterator[None]:
    """What runs inside may move the recurrent states of the first `rows` rows: they stand as before at its end, however it ends. The slot
    of keys and values that it writes is the next one of each row, which the step itself writes again."""
    saved = decoder.slots(rows, 1)
    parts = ((slots.convolution, saved.convolution), (slots.ssm, saved.ssm))
    for part, copy in parts:
        for layer, tensor in part.items():
            copy[layer].copy_(tensor[:rows])
    try:
        yield
    finally:
        for part, copy in parts:
            for layer, tensor in part.items():
                tensor[:rows].copy_(copy[layer])


class DecodeGraphs:
    """`decode` as `ServingDecoder.decode`, by replaying a graph where there can be one."""

    def __init__(self, decoder: ServingDecoder):
        self.decoder = decoder
        self.reason: str | None = None  # why steps are not captured
        self.measured: dict[tuple[int, int], tuple[float, float]] = {}  # rows and stretch: seconds of a plain step and of a replay
        self._too_large: int | None = None  # the generation of buffers beside which there was no memory for graphs
        self._graphs: OrderedDict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Tensor] | None] = OrderedDict()  # None: it does not pay
        self._pool = self._side = None

    def decode(self, tokens: Tensor, slots: Slots, span: int, *, even: bool = False) -> Tensor:
        # The model's GPU need not be the process's current one, whose streams a capture would listen to.
        with torch.cuda.device(tokens.device):
            captured = self._captured(tokens, slots, span, even)
            if captured is None:
                return self.decoder.decode(tokens, slots, span, even=even)
            graph, given, logits = captured
            given[: len(tokens)] = tokens
            graph.replay()
            return logits[: len(tokens)].clone()

    def _captured(self, tokens: Tensor, slots: Slots, span: int, even: bool) -> tuple | None:
        """The graph for such a step, the token ids that it reads (rows,) and the logits that it writes (rows, vocabulary); None where the
        step is to run as it is."""
        if self.reason is not None or self._too_large == slots.generation:
            return None
        rows = min(1 << (len(tokens) - 1).bit_length(), slots.rows)
        stretch = min(-(-span // STRETCH) * STRETCH, slots.span)
        key = (slots.generation, rows, stretch)
        if key not in self._graphs:
            try:
                self._capture(key, slots, lambda: self.decoder.decode(tokens, slots, span, even=even), tokens.device)
            except RuntimeError as error:
                self._give_up(error, slots)
                return None
        self._graphs.move_to_end(key)
        return self._graphs[key]

    def _give_up(self, error: RuntimeError, slots: Slots) -> None:
        """For good, or where memory was short until there are other buffers."""
        if isinstance(error, torch.OutOfMemoryError):
            self._too_large = slots.generation
        else:
            self.reason = str(error).splitlines()[0]
        self._graphs.clear()
        self._pool = None
        torch.cuda.synchronize()

    def _capture(self, key: tuple[int, int, int], slots: Slots, plain_step: Callable[[], Tensor], device: torch.device) -> None:
        """For (generation, rows, stretch); `plain_step`: the step that would run otherwise."""
        _, rows, stretch = key
        # Buffers of an earlier generation are gone, and with them the meaning of their graphs.
        for old in [old for old in self._graphs if old[0] != key[0]]:
            del self._graphs[old]
        if len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        if not any(self._graphs.values()):  # a pool is gone with the last graph that lives in it
            self._pool = torch.cuda.graph_pool_handle()  # one for all: they run in turns, and what comes out of one is copied at once
        given = torch.zeros(rows, dtype=torch.long, device=device)
        with _states_as_they_were(self.decoder, slots, rows):
            self._side = self._side or torch.cuda.Stream()  # its own: another engine's captures have theirs
            self._side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._side):
                self.decoder.decode(given, slots, stretch)
            torch.cuda.current_stream().wait_stream(self._side)
            plain = seconds_of(plain_step)
            graph = torch.cuda.CUDAGraph()
            # Other threads may allocate meanwhile: one that opens pictures, another engine.
            with torch.cuda.graph(graph, pool=self._pool, stream=self._side, capture_error_mode="thread_local"):
                logits = self.decoder.decode(given, slots, stretch)
            replayed = seconds_of(graph.replay)
        self.measured[rows, stretch] = plain, replayed
        self._graphs[key] = (graph, given, logits) if replayed < plain else None
