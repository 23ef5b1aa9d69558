"""What decoding a token costs at 1k to 16k tokens of context, and how much of it is the attention layers: the rest must stay flat."""

import time
from pathlib import Path

import torch

from vlm.checkpoint import load_model
from vlm.decoder.serving import ServingDecoder

CONTEXTS = (1024, 2048, 4096, 8192, 16384)
STEPS = 40


def decode_times(folder: Path, rows: tuple[int, ...] = (1, 4)) -> list[dict]:
    """Best CPU milliseconds of a step, of its attention layers, and of a step without them. The context is not read but filled with random
    numbers: the time of a step does not depend on them.

    What is left of a step when the time within the attention layers is taken off still has a part of theirs: long keys and values drive
    the weights of a small model out of the processor's cache, and the other layers wait for them. A step that leaves the attention layers
    out has the other layers alone, on the same state.
    """
    model, _ = load_model(folder)
    decoder = ServingDecoder(model.language_model, 2**30)
    spent = [0.0]
    timed = {serving: _timed(serving.decode, spent) for serving in decoder.attention_layers}
    table = []
    with torch.inference_mode():
        for count in rows:
            for context in CONTEXTS:
                slots = decoder.slots(count, context + 2 * STEPS + 2)
                for part in (slots.keys, slots.values, slots.ssm, slots.convolution):
                    for tensor in part.values():
                        tensor.normal_(std=0.1)
                slots.advance(list(range(count)), [context] * count)
                for serving, decode in timed.items():
                    serving.decode = decode
                whole, attention = _best_step(decoder, slots, count, spent)
                for serving in timed:
                    serving.decode = lambda x, slots, step: torch.zeros_like(x)
                without, _ = _best_step(decoder, slots, count, spent)
                table.append({"rows": count, "context": context, "step_ms": whole * 1e3, "attention_ms": attention * 1e3,
                              "without_ms": without * 1e3})  # fmt: skip
    return table


def _best_step(decoder: ServingDecoder, slots, count: int, spent: list[float]) -> tuple[float, float]:
    """CPU seconds of the fastest of some steps, and those within its attention layers."""
    best, tokens = (float("inf"), 0.0), torch.zeros(count, dtype=torch.long)
    for _ in range(STEPS):
        spent[0], begun = 0.0, time.process_time()
        decoder.decode(tokens, slots, max(slots.counts) + 1, even=True)
        best = min(best, (time.process_time() - begun, spent[0]))
        slots.advance(list(range(count)), [1] * count)
    return best


def _timed(function, spent: list[float]):
    def timed(*arguments):
        begun = time.process_time()
        result = function(*arguments)
        spent[0] += time.process_time() - begun
        return result

    return timed
