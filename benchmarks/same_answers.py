"""Do requests get the answer they would get alone, whatever else goes on? Random mixes on a trained model, counted.

    python benchmarks/same_answers.py --model runs/quickstart/model --data runs/quickstart/scenes/heldout/vqav2

A mix: 2 to 40 requests of random pictures, texts, lengths and turns, greedy or drawn with a seed; some arrive late, some are cancelled,
some continue a kept conversation; batch size and memory are random too. Alone: a fresh engine that has read nothing else. Where an
answer differs, the gap between the two best logits at the first different token is stated; below 1e-3 rounding may decide.
Writes benchmarks/results/same_answers.{md,json}.

Every mix is run twice: as the engine is, and with the ways that it takes where states or shared pasts are large (rows without a state of
their own, vlm/decoder/tails.py; shared keys read once, shared_attention.py), which a small model would never see.
"""

import argparse
import contextlib
import json
import platform
import random
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import transformers  # noqa: E402

from vlm.checkpoint import load_model  # noqa: E402
from vlm.decoder import decode_step, tails  # noqa: E402
from vlm.engine import Engine, Request  # noqa: E402
from vlm.files import write_whole  # noqa: E402

NEAR_TIE = 1e-3
WORDS = ("What colour is it?", "How many are there?", "Is it red?", "Describe the picture.", "What is written?", "Where?", "and then", "x")


def random_request(draw: random.Random, pictures: list) -> Request:
    """0 to 3 pictures, 1 to 3 turns, up to 24 new tokens."""
    messages = []
    for turn in range(draw.choice((1, 1, 1, 2, 3))):
        if turn:
            messages.append({"role": "assistant", "content": draw.choice(("red", "two", "a blue square", "yes"))})
        shown = draw.choices(pictures, k=draw.choice((1, 1, 1, 2, 0) if turn == 0 else (0, 0, 1)))
        text = " ".join(draw.choices(WORDS, k=draw.choice((1, 1, 2, 5))))
        messages.append(
            {"role": "user", "content": [*({"type": "image", "image": each} for each in shown), {"type": "text", "text": text}]}
        )
    drawn = (
        {"temperature": draw.choice((0.5, 1.0)), "seed": draw.randrange(100), "top_p": draw.choice((0.9, 1.0))}
        if draw.random() < 0.2
        else {}
    )
    return Request(messages, max_new_tokens=draw.randint(1, 24), stop=draw.choice(((), (), (), ("a",))), **drawn)


def run_mix(engine: Engine, draw: random.Random, requests: list[Request]) -> list:
    """Submit them in bursts between steps, cancel one in ten on the way; -> tickets, all over."""
    tickets, late, most = [], list(requests), 0
    while late or any(ticket.answer is None for ticket in tickets):
        for _ in range(min(len(late), draw.choice((0, 0, 1, 3, len(late))))):
            tickets.append(engine.submit(late.pop(0), keep=draw.random() < 0.5))
        for ticket in tickets:
            if ticket.answer is None and draw.random() < 0.01:
                ticket.cancel()
        engine.step()
        most = max(most, sum(engine._scheduler.slots.is_tail) if engine._scheduler.slots is not None else 0)
    return tickets, most


@torch.inference_mode()
def logit_gap(engine: Engine, request: Request, said: tuple[int, ...]) -> float:
    """Difference of the two best logits after the prompt and `said`, by the model's plain forward."""
    prepared = engine.processor.prepare(request.messages, add_generation_prompt=True)
    ids = torch.tensor([[*prepared.rendered.input_ids, *said]])
    pixels = engine.processor.image_processor.normalize_pixels(prepared.pixels)
    logits = engine.model(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits[0, -1]
    logits[engine.model.config.image_token_id] = float("-inf")
    best = logits.topk(2).values
    return float(best[0] - best[1])


@contextlib.contextmanager
def as_for_large_states(wanted: bool):
    """Tails and shared keys for any size of state and of shared past."""
    before = tails.LEAST_STATE_BYTES, decode_step.LEAST_SHARED_ELEMENTS
    if wanted:
        tails.LEAST_STATE_BYTES = decode_step.LEAST_SHARED_ELEMENTS = 1
    try:
        yield
    finally:
        tails.LEAST_STATE_BYTES, decode_step.LEAST_SHARED_ELEMENTS = before


def compare_mixes(model, processor, pictures: list, mixes: int, seed: int = 0) -> dict:
    """Counts of answers: compared, cancelled, different at a near tie, wrong (with what was found)."""
    draw = random.Random(seed)
    counts = {"mixes": mixes, "answers": 0, "tokens": 0, "cancelled": 0, "shared_tokens": 0, "near_ties": 0, "mixes_with_tails": 0,
              "wrong": []}  # fmt: skip
    for number in range(mixes):
        some = draw.sample(pictures, k=min(len(pictures), draw.randint(1, 6)))
        requests = [random_request(draw, some) for _ in range(draw.randint(2, 40))]
        memory = draw.choice((2**28, 2**24))
        batch, drawn = draw.choice((1, 3, 8, 64)), random.Random(draw.random())
        alones = [Engine(model, processor, max_batch=1, memory_bytes=2**28, self_check=False).generate([each])[0] for each in requests]
        pairs = []
        for large in (False, True):
            with as_for_large_states(large):
                engine = Engine(model, processor, max_batch=batch, memory_bytes=memory, self_check=False)
                tickets, most = run_mix(engine, drawn, requests)
            counts["mixes_with_tails"] += most > 0
            pairs += [(request, ticket.answer, alone) for request, ticket, alone in zip(requests, tickets, alones, strict=True)]
        for request, found, alone in pairs:
            counts["answers"] += 1
            counts["tokens"] += found.generated_tokens
            counts["shared_tokens"] += found.shared_tokens
            if found.stop_reason == "cancelled":
                counts["cancelled"] += 1
                same = alone.tokens[: len(found.tokens)] == found.tokens
            else:
                same = (found.text, found.stop_reason, found.tokens) == (alone.text, alone.stop_reason, alone.tokens)
            if not same:
                first = next((i for i, (a, b) in enumerate(zip(found.tokens, alone.tokens, strict=False)) if a != b), len(alone.tokens))
                gap = logit_gap(engine, request, alone.tokens[:first]) if not found.error else float("inf")
                if request.temperature == 0 and gap < NEAR_TIE:
                    counts["near_ties"] += 1
                else:
                    counts["wrong"].append({"mix": number, "found": found.text, "alone": alone.text, "error": found.error, "gap": gap})
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True, help="folder with pictures, searched through")
    parser.add_argument("--mixes", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "same_answers", help="path of the results, without ending")
    options = parser.parse_args()
    pictures = sorted(path for path in options.data.rglob("*") if path.suffix in (".png", ".jpg"))[:200]
    if not pictures:
        parser.error(f"no .png or .jpg below {options.data}")
    model, processor = load_model(options.model)
    started = time.monotonic()
    counts = compare_mixes(model, processor, pictures, options.mixes, options.seed)
    summary = (
        f"{counts['mixes']} mixes, {counts['answers']} answers of {counts['tokens']} tokens ({counts['cancelled']} cancelled; "
        f"{counts['shared_tokens']} prompt tokens shared; rows without a state of their own in {counts['mixes_with_tails']} mixes): "
        f"{len(counts['wrong'])} differ from the single run, "
        f"{counts['near_ties']} more at a gap of the two best logits below {NEAR_TIE:g}"
    )
    print(summary)
    for wrong in counts["wrong"][:5]:
        print(wrong)
    facts = {"command": "python benchmarks/same_answers.py " + " ".join(sys.argv[1:]), "seconds": round(time.monotonic() - started, 1),
             "dtype": str(model.dtype), "python": platform.python_version(), "torch": torch.__version__,
             "transformers": transformers.__version__, "machine": platform.machine()}  # fmt: skip
    write_whole(options.out.with_suffix(".json"), json.dumps({**facts, **counts}, indent=1))
    write_whole(options.out.with_suffix(".md"), f"# Same answers\n\n{summary}.\n\n`{facts['command']}`\n\n{facts}\n")
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
