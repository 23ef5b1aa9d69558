"""How well the decoder still writes: perplexity of plain text, before and after it has learnt to see.

    python -m train_vlm.perplexity --model DIR --text FILE [--max-tokens 4096] [--json]

Exact for the windows it reads: a document is cut into windows of `max_tokens` that overlap by one token, so that every token but the first
of a document is predicted once, from at most `max_tokens - 1` tokens before it. Windows are packed, which changes no prediction; a test
holds it against one window at a time. Numbers of models with different tokenizers do not compare.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch

from train_vlm.batching import pack
from train_vlm.heldout import looking
from train_vlm.plain_text import read_documents
from train_vlm.training_step import forward_inputs
from vlm.checkpoint import load_model
from vlm.device import default_device
from vlm.processing import VLMProcessor

__all__ = ["main", "measure_perplexity", "text_windows"]

MAX_TOKENS = 4096


def text_windows(path: str | Path, processor: VLMProcessor, max_tokens: int = MAX_TOKENS) -> list[dict]:
    """The windows of a file as samples for `pack`, longest first (so that packs are of like cost).

    Raises FileNotFoundError / ValueError as `read_documents`, and ValueError for windows too short to predict anything.
    """
    if max_tokens < 2:
        raise ValueError(f"windows of {max_tokens} tokens predict nothing; expected at least 2")
    size, samples = processor.image_processor.tile_size, []
    for name, text in read_documents(path):
        ids = processor.renderer.render_text(text).input_ids
        for start in range(0, max(len(ids) - 1, 1), max_tokens - 1):
            window = ids[start : start + max_tokens]
            samples.append({"source": 0, "id": f"{name}@{start}", "input_ids": window, "labels": window, "tiles_reduced": 0,
                            "pixels": torch.zeros(0, size, size, 3, dtype=torch.uint8)})  # fmt: skip
    return sorted(samples, key=lambda sample: -len(sample["input_ids"]))


def _packs(samples: list[dict], most_tokens: int) -> list[list[dict]]:
    """Samples in order, together as long as they stay within `most_tokens`."""
    packs, room = [], 0
    for sample in samples:
        length = len(sample["input_ids"])
        if not packs or length > room:
            packs.append([])
            room = most_tokens
        packs[-1].append(sample)
        room -= length
    return packs


@torch.no_grad()
def measure_perplexity(call, samples: list[dict], processor: VLMProcessor, *, pack_tokens: int = MAX_TOKENS) -> dict:
    """{"perplexity", "loss": mean negative log-likelihood in nats, "tokens": predicted} of `text_windows`.

    `call`: the model, or DeepSpeed's engine around it; with torch.distributed every rank calls it and reads its share.
    """
    model = getattr(call, "module", call)
    device = getattr(call, "device", None) or next(model.parameters()).device
    is_shared = torch.distributed.is_available() and torch.distributed.is_initialized()
    rank, ranks = (torch.distributed.get_rank(), torch.distributed.get_world_size()) if is_shared else (0, 1)
    packs, sums = _packs(samples, pack_tokens), torch.zeros(2, dtype=torch.float64)
    with looking(model):
        for start in range(0, len(packs), ranks):  # under ZeRO-3 every rank has to take part in every pass
            mine = packs[start + rank] if start + rank < len(packs) else []
            batch = pack(mine, processor.renderer.end_of_turn_id, processor.image_processor.tile_size)
            output = call(**forward_inputs(batch, processor, device, model.vision_encoder.weight_dtype), num_items_in_batch=1)
            sums += torch.tensor([output.token_losses.double().sum().item(), len(output.token_losses)], dtype=torch.float64)
    if is_shared:
        sums = sums.to(device)
        torch.distributed.all_reduce(sums)
    total, tokens = sums.tolist()
    if not tokens:
        raise ValueError("the text has a single token; nothing can be predicted")
    loss = total / tokens
    return {"perplexity": math.exp(loss) if loss < 700 else math.inf, "loss": loss, "tokens": int(tokens)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m train_vlm.perplexity", description="Perplexity of a model's decoder on plain text.")
    parser.add_argument("--model", required=True, metavar="DIR")
    parser.add_argument("--text", required=True, metavar="FILE", help='plain text, or .jsonl with {"text": ...} a line')
    parser.add_argument("--max-tokens", type=int, default=MAX_TOKENS, help=f"longest window (default {MAX_TOKENS})")
    parser.add_argument("--json", action="store_true", help="print one line of JSON")
    options = parser.parse_args(arguments)
    try:
        model, processor = load_model(options.model)
        model.to(default_device())
        samples = text_windows(options.text, processor, options.max_tokens)
        found = measure_perplexity(model, samples, processor, pack_tokens=max(MAX_TOKENS, options.max_tokens))
    except (ValueError, OSError) as error:
        print(f"perplexity: {error}", file=sys.stderr)
        return 2
    if options.json:
        print(json.dumps(found))
    else:
        print(f"perplexity {found['perplexity']:.4f} ({found['loss']:.5f} nats a token over {found['tokens']:,} tokens)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
