"""What capturing a decoding step as a CUDA graph saves: milliseconds a step, replayed and as it is, for few rows and many. Needs a GPU.

    python benchmarks/captured_steps.py              writes benchmarks/results/captured_steps.{md,json}

Random weights in bfloat16; every row has read 512 tokens. Both ways go on from the same state, take turns, and say the same tokens, which
is checked. The first step of a graph, which captures it, is told apart. A step of a small batch is mostly the launching of its kernels,
one of 8 billion parameters mostly the reading of its weights: how much is saved, and where, is what this is for.
"""

import argparse
import json
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from decoder import BODY  # noqa: E402
from result_files import write_results  # noqa: E402
from shown_command import shown_command  # noqa: E402
from transformers.models.nemotron_h import NemotronHForCausalLM  # noqa: E402

from vlm.decoder import preset_config, take_over_mixers  # noqa: E402
from vlm.decoder.serving import ServingDecoder  # noqa: E402
from vlm.engine.decode_graphs import DecodeGraphs  # noqa: E402

SIZES = {"tiny": ("tiny", {}), "60M": ("tiny", BODY), "4b": ("4b", {}), "8b": ("8b", {})}
READ_TOKENS = 512


def build(size: str, device: torch.device) -> ServingDecoder:
    preset, settings = SIZES[size]
    torch.manual_seed(0)
    with device:
        model = NemotronHForCausalLM(preset_config(preset, **settings)).to(torch.bfloat16).eval()
    take_over_mixers(model)
    return ServingDecoder(model)


def _started(decoder: ServingDecoder, rows: int, steps: int):
    """Slots whose rows have read random embeddings."""
    slots, width = decoder.slots(rows, READ_TOKENS + steps + 8), decoder.weight.shape[1]
    for row in range(rows):
        generator = torch.Generator().manual_seed(row)
        embeddings = torch.randn(READ_TOKENS, width, generator=generator).to(decoder.weight.device, decoder.weight.dtype)
        decoder.prefill(embeddings, slots, [row], [READ_TOKENS], last_only=True)
    return slots


def run(decoder: ServingDecoder, rows: int, steps: int, captured: bool) -> dict:
    """One way: seconds of the first step and of the others, and what was said."""
    device, slots = decoder.weight.device, _started(decoder, rows, steps)
    graphs = DecodeGraphs(decoder) if captured else None
    step, tokens, said, seconds = graphs.decode if graphs else decoder.decode, torch.zeros(rows, dtype=torch.long, device=device), [], []
    for _ in range(steps):
        torch.cuda.synchronize(device)
        begun = time.perf_counter()
        tokens = step(tokens, slots, max(slots.counts) + 1, even=True).argmax(-1)
        slots.advance(list(range(rows)), [1] * rows)
        said.append(tokens.tolist())
        seconds.append(time.perf_counter() - begun)
    reason = graphs.reason if graphs else None
    if graphs and not graphs.measured:
        reason = reason or "nothing was captured: no memory for a graph"
    given_up = bool(graphs and graphs.measured) and all(plain <= replayed for plain, replayed in graphs.measured.values())
    return {"first_ms": seconds[0] * 1e3, "ms": min(seconds[1:]) * 1e3, "said": said, "reason": reason, "given_up": given_up}


def page(result: dict) -> str:
    versions = f"torch {result['torch']}, transformers {result['transformers']}"
    lines = [
        "# Decoding steps, captured and as they are",
        "",
        f"{result['device']}, bfloat16, {versions}; {result['steps']} steps behind {READ_TOKENS} tokens.",
        "",
        "| decoder | rows | as it is, ms | captured, ms | as it is over captured | capturing, ms | same tokens |",
        "|---|---:|---:|---:|---:|---:|---|",
    ]
    for row in result["rows"]:
        same = "yes" if row["same"] else f"NO {row['reason'] or ''}".strip()
        same += "; does not pay, steps run as they are" if row["given_up"] else ""
        figures = (
            f"{row['plain_ms']:.2f} | {row['captured_ms']:.2f} | {row['plain_ms'] / row['captured_ms']:.2f}x | {row['capture_ms']:.0f}"
        )
        lines.append(f"| {row['size']} | {row['rows']} | {figures} | {same} |")
    return "\n".join([*lines, "", f"    {result['command']}", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 64])
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "captured_steps")
    options = parser.parse_args()
    device, rows = torch.device(options.device), []
    if device.type != "cuda" or not torch.cuda.is_available():
        print("captured_steps: no CUDA device; there is nothing to capture", file=sys.stderr)
        return 2
    for size in options.sizes:
        decoder = build(size, device)
        for count in options.rows:
            run(decoder, count, 3, captured=False)  # kernels are chosen and compiled
            plain, captured = (run(decoder, count, options.steps, captured=way) for way in (False, True))
            rows.append({
                "size": size, "rows": count, "plain_ms": plain["ms"], "captured_ms": captured["ms"], "capture_ms": captured["first_ms"],
                "same": plain["said"] == captured["said"] and captured["reason"] is None, "reason": captured["reason"],
                "given_up": captured["given_up"],
            })  # fmt: skip
            print(json.dumps(rows[-1]), file=sys.stderr)
        del decoder
        torch.cuda.empty_cache()
    result = {
        "command": shown_command("captured_steps.py"), "device": torch.cuda.get_device_name(device), "torch": torch.__version__,
        "transformers": transformers.__version__, "steps": options.steps, "rows": rows,
    }  # fmt: skip
    write_results(options.out, result, page(result))
    return 0 if all(row["same"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
