"""Newton-Schulz iterations within the Gram matrix beside iterations on the matrix itself, for the shapes of the quickstart's model.

    python benchmarks/muon.py                       writes benchmarks/results/muon.{md,json}

Best of some passes on one thread, the ways in turns; the error is the largest difference from the definition in float64, over the largest
entry, of a gradient of full rank and of one of rank 5.
"""

import argparse
import os
import platform
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
from result_files import write_results  # noqa: E402
from shown_command import shown_command  # noqa: E402

from train_vlm.muon import _iterate, _iterate_within_gram, orthogonalize  # noqa: E402

SHAPES = ((384, 384), (128, 128), (128, 256), (128, 384), (128, 584), (96, 864), (48, 288))
WAYS = {"itself": _iterate, "within Gram": _iterate_within_gram, "chosen": lambda x, iterations: orthogonalize(x, iterations)}
ITERATIONS, PASSES = 5, 40


def row(shape: tuple[int, int]) -> dict:
    generator = torch.Generator().manual_seed(0)
    full = torch.randn(shape, generator=generator, dtype=torch.float64)
    low = torch.randn(shape[0], 5, generator=generator, dtype=torch.float64) @ torch.randn(
        5, shape[1], generator=generator, dtype=torch.float64
    )
    found = {"shape": list(shape), "milliseconds": dict.fromkeys(WAYS, float("inf"))}
    x = (full / full.norm()).float()
    for _ in range(PASSES):
        for way, iterate in WAYS.items():
            begun = time.perf_counter()
            iterate(x, ITERATIONS)
            found["milliseconds"][way] = min(found["milliseconds"][way], (time.perf_counter() - begun) * 1e3)
    for name, matrix in (("full rank", full), ("rank 5", low)):
        matrix = matrix / matrix.norm()
        expected = _iterate(matrix, ITERATIONS)
        errors = {way: (iterate(matrix.float(), ITERATIONS) - expected).abs().max() / expected.abs().max() for way, iterate in WAYS.items()}
        found[name] = {way: error.item() for way, error in errors.items()}
    return found


def page(result: dict) -> str:
    lines = [
        "# Muon's iterations",
        "",
        f"{ITERATIONS} iterations, float32, one thread on {result['machine']}, torch {result['torch']}. The errors of the second way.",
        "",
        "| matrix | itself, ms | within its Gram matrix, ms | ratio | chosen, ms | error, full rank | error, rank 5 |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    for each in result["rows"]:
        itself, within, chosen = each["milliseconds"].values()
        errors = f"{each['full rank']['within Gram']:.0e} | {each['rank 5']['within Gram']:.0e}"
        lines.append(
            f"| {each['shape'][0]} x {each['shape'][1]} | {itself:.2f} | {within:.2f} | {itself / within:.1f}x | {chosen:.2f} | {errors} |"
        )
    return "\n".join([*lines, "", f"    {result['command']}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "muon")
    options = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        "command": shown_command("muon.py"), "machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__,
        "python": platform.python_version(), "rows": [row(shape) for shape in SHAPES],
    }  # fmt: skip
    write_results(options.out, result, page(result))


if __name__ == "__main__":
    main()
