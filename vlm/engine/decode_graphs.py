"""On a GPU: a decoding step captured as a CUDA graph, because a step of a small batch is mostly the launching of its hundreds of kernels.

A graph is made for each size of batch (powers of two) and stretch of slots (multiples of 512); rows beyond the running ones compute on
rows nobody uses. What cannot be captured (a mixture of experts picks its experts on the host) runs as it is, and `reason` says why.
"""

from collections import OrderedDict

import torch
from torch import Tensor

from ..decoder.serving import ServingDecoder
from ..decoder.slots import Slots

__all__ = ["DecodeGraphs"]

MOST_GRAPHS = 16
STRETCH = 512


class DecodeGraphs:
    """`decode` as `ServingDecoder.decode`, by replaying a graph where there can be one."""

    def __init__(self, decoder: ServingDecoder):
        self.decoder = decoder
        self.reason: str | None = None  # why steps are not captured
        self._graphs: OrderedDict[tuple, tuple[torch.cuda.CUDAGraph, Tensor, Tensor]] = OrderedDict()

    def decode(self, tokens: Tensor, slots: Slots, span: int, *, even: bool = False) -> Tensor:
        rows = min(1 << (len(tokens) - 1).bit_length(), slots.rows)
        stretch = min(-(-span // STRETCH) * STRETCH, slots.span)
        if self.reason is not None:
            return self.decoder.decode(tokens, slots, span, even=even)
        key = (slots.generation, rows, stretch)
        if key not in self._graphs:
            try:
                self._capture(key, slots, rows, stretch, tokens)
            except RuntimeError as error:
                self.reason = str(error).splitlines()[0]
                self._graphs.clear()
                torch.cuda.synchronize()
                return self.decoder.decode(tokens, slots, span, even=even)
        graph, given, logits = self._graphs[key]
        self._graphs.move_to_end(key)
        given[: len(tokens)] = tokens
        graph.replay()
        return logits[: len(tokens)].clone()

    def _capture(self, key: tuple, slots: Slots, rows: int, stretch: int, tokens: Tensor) -> None:
        # Buffers of an earlier generation are gone, and with them the meaning of their graphs.
        for old in [old for old in self._graphs if old[0] != key[0]]:
            del self._graphs[old]
        if len(self._graphs) >= MOST_GRAPHS:
            self._graphs.popitem(last=False)
        given = torch.zeros(rows, dtype=torch.long, device=tokens.device)
        saved = self.decoder.slots(rows, 1)  # the warm-up must not move the recurrent states; the slot it writes is written again
        for part, copy in ((slots.convolution, saved.convolution), (slots.ssm, saved.ssm)):
            for layer, tensor in part.items():
                copy[layer].copy_(tensor[:rows])
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self.decoder.decode(given, slots, stretch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits = self.decoder.decode(given, slots, stretch)
        for part, copy in ((slots.convolution, saved.convolution), (slots.ssm, saved.ssm)):
            for layer, tensor in part.items():
                tensor[:rows].copy_(copy[layer])
        self._graphs[key] = graph, given, logits
