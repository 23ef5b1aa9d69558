"""What decoding a token costs at 1k to 16k tokens of context, and how much of it is the attention layers: the rest must stay flat."""

import time
from pathlib import Path

import torch

from vlm.checkpoint import load_model
from vlm.decoder.serving import ServingDecoder

CONTEXTS = (1024, 2048, 4096, 8192, 16384)
STEPS = 12


def decode_times(folder: Path, rows: tuple[int, ...] = (1, 4)) -> list[dict]:
    """Best CPU milliseconds of a step, and of its attention layers. The context is not read but filled with random numbers: the time of a
    step does not depend on them."""
    model, _ = load_model(folder)
    decoder = ServingDecoder(model.language_model, 2**30)
    spent = [0.0]
    for serving in decoder.attention_layers:
        serving.decode = _timed(serving.decode, spent)
    table = []
    with torch.inference_mode():
        for count in rows:
            for context in CONTEXTS:
                slots = decoder.slots(count, context + STEPS + 2)
                for part in (slots.keys, slots.values, slots.ssm, slots.convolution):
                    for tensor in part.values():
                        tensor.normal_(std=0.1)
                slots.advance(list(range(count)), [context] * count)
                tokens = torch.zeros(count, dtype=torch.long)
                best = (float("inf"), 0.0)
                for _ in range(STEPS):
                    spent[0], begun = 0.0, time.process_time()
                    decoder.decode(tokens, slots, max(slots.counts) + 1, even=True)
                    best = min(best, (time.process_time() - begun, spent[0]))
                    slots.advance(list(range(count)), [1] * count)
                table.append({"rows": count, "context": context, "step_ms": best[0] * 1e3, "attention_ms": best[1] * 1e3})
    return table


def _timed(function, spent: list[float]):
    def timed(*arguments):
        begun = time.process_time()
        result = function(*arguments)
        spent[0] += time.process_time() - begun
        return result

    return timed
