"""The error of the scan in float32 against the recurrence in float64 over many random shapes: what `scan.py --exactness N` runs.

Shapes, clamps, borders and initial states are those of the tests (tests/decoder/random_scans.py). Each shape is measured under two losses:
half the sum of squared results, and results under random weights. Under random weights the gradients of A, D and dt_bias, sums over
thousands of positions, can be thousands of times smaller than what they are the sum of; float32 then has that many digits less.
"""

import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "decoder"))

from random_scans import compare, random_case  # noqa: E402

__all__ = ["BOUND", "exactness", "exactness_page"]

BOUND = 1e-5


def exactness(count: int) -> dict:
    """{"count", "losses": {loss: {what: {"worst", "seed", "above"}}}, "lengths"}: the largest error of each tensor, where, and in how many
    shapes it is above the bound."""
    started, lengths = time.perf_counter(), []
    losses: dict = {"half the squared results": {}, "random weights": {}}
    for seed in range(count):
        tensors, settings, chunk_size = random_case(seed)
        lengths.append(tensors["x"].shape[1])
        generator = torch.Generator().manual_seed(1000 + seed)

        def drawn(part, generator=generator):
            return torch.randn(part.shape, generator=generator)

        for loss, weigh in zip(losses, (lambda part: part, drawn), strict=True):
            for what, error in compare(tensors, settings, chunk_size, weigh).items():
                entry = losses[loss].setdefault(what, {"worst": 0.0, "seed": None, "above": 0, "shapes": 0})
                entry["shapes"] += 1
                entry["above"] += not error < BOUND
                if not error <= entry["worst"]:
                    entry["worst"], entry["seed"] = error, seed
    return {"count": count, "lengths": [min(lengths), max(lengths)], "losses": losses, "seconds": time.perf_counter() - started}


def exactness_page(result: dict) -> str:
    first, second = result["losses"]
    lines = [
        "# The Mamba-2 scan in float32 against the recurrence in float64",
        "",
        f"{result['count']} random shapes, {result['lengths'][0]} to {result['lengths'][1]:,} positions, borders anywhere; "
        f"torch {result['torch']}, {result['machine']}. Largest difference over largest value of the tensor, in the worst shape; in "
        f"brackets the number of shapes above {BOUND:.0e}, if any. The loss is half the sum of squared results, or a sum under random "
        "weights, where the gradients that are sums over all positions (A, D, dt_bias) may nearly cancel.",
        "",
        f"| tensor | shapes | {first} | {second} |",
        "|---|---|---|---|",
    ]
    for what, entry in result["losses"][first].items():
        cells = [
            f"{found['worst']:.1e}" + (f" ({found['above']})" if found["above"] else "")
            for found in (entry, result["losses"][second][what])
        ]
        lines.append(f"| {what} | {entry['shapes']} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"    {result['command']}", ""])
