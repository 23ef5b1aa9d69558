"""Time, peak memory and error of the Mamba-2 scan beside transformers' own fallback, and how the time grows with the length.

    python benchmarks/scan.py                                   writes benchmarks/results/scan.{md,json}; some ten minutes on two cores
    python benchmarks/scan.py --shapes tiny --lengths 256 1024 --seconds 1 --out scan-result
    python benchmarks/scan.py --exactness 200                   float32 against float64 over random shapes: results/scan_exactness.{md,json}

Each row is one process that runs both ways in turn on the same tensors, and one process for each figure of memory. A length whose fallback
would not fit in the free memory, or longer than --longest-baseline, is measured for ours alone, and the table says so. Shapes and dtypes
that a run leaves out stay in the result file as they were, if machine and versions are the same.
"""

import argparse
import json
import math
import os
import platform
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import transformers  # noqa: E402
from scan_cases import SHAPES, errors, memory, times  # noqa: E402
from scan_exactness import exactness, exactness_page  # noqa: E402
from shown_command import shown_command  # noqa: E402

from vlm.files import write_whole  # noqa: E402

LENGTHS = [256, 512, 1024, 2048, 4096, 8192, 16384]
ERROR_LENGTH = 512
WAYS = ["ours", "transformers"]


def free_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def growth(rows: list[dict], kind: str) -> float | None:
    """The exponent p of time ~ length ** p, by least squares over the logarithms, from 1,024 positions on."""
    points = [(math.log(row["length"]), math.log(row["times"]["ours"][kind])) for row in rows if row["length"] >= 1024]
    if len(points) < 2:
        return None
    mean_x, mean_y = (sum(values) / len(points) for values in zip(*points, strict=True))
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / sum((x - mean_x) ** 2 for x, _ in points)


def measure_rows(shape: str, dtype: str, options: argparse.Namespace, child) -> list[dict]:
    rows, needed = [], 0.0
    for length in sorted(options.lengths):
        ours = child("memory", shape, dtype, length, "ours", "both")["bytes"]
        row = {"length": length, "memory": {"ours": ours}}
        expected = needed * (length / rows[-1]["length"]) ** 1.2 if rows else 0.0  # its states grow with the square of the chunks
        fits = expected < 0.8 * free_bytes() and length <= options.longest_baseline
        if fits:
            needed = row["memory"]["transformers"] = child("memory", shape, dtype, length, "transformers", "both")["bytes"]
        else:
            needed = expected
            row["left_out"] = f"fallback not run; it would need about {expected / 1e9:.0f} GB"
        row["times"] = child("times", shape, dtype, length, ",".join(WAYS if fits else WAYS[:1]))
        rows.append(row)
        print(shape, dtype, json.dumps(row), file=sys.stderr, flush=True)
    return rows


def line(row: dict) -> str:
    mine, theirs = row["times"]["ours"], row["times"].get("transformers")
    cells = [f"{row['length']:,}", f"{mine['forward']:,.1f}", f"{mine['both']:,.1f}", f"{row['memory']['ours'] / 1e6:,.0f}"]
    if theirs:
        cells[1] += f" / {theirs['forward']:,.1f}"
        cells[2] += f" / {theirs['both']:,.1f}"
        cells[3] += f" / {row['memory']['transformers'] / 1e6:,.0f}"
        cells += [f"{theirs[kind] / mine[kind]:.1f}x" for kind in ("forward", "both")]
        cells.append(f"1/{row['memory']['transformers'] / max(row['memory']['ours'], 1):.1f}")
    else:
        cells += [row["left_out"], "", ""]
    return "| " + " | ".join(cells) + " |"


def page(result: dict) -> str:
    lines = [
        "# The Mamba-2 scan beside transformers' fallback",
        "",
        f"{result['machine']}, {result['threads']} threads, torch {result['torch']}, transformers {result['transformers']}, Python "
        f"{result['python']}. In each cell: ours / transformers' `mamba2_chunk_scan`, same tensors, passes in turn, the fastest of each. "
        "Memory is the peak of forward and backward above the inputs.",
    ]
    for part in result["parts"]:
        sizes = ", ".join(f"{value} {name}" for name, value in SHAPES[part["shape"]].items())
        lines += ["", f"## {part['shape']}, {part['dtype']} ({sizes})", ""]
        lines += [
            "| positions | forward, ms | forward + backward, ms | memory, MB | forward | forward + backward | memory |",
            "|---|---|---|---|---|---|---|",
            *(line(row) for row in part["rows"]),
            "",
        ]
        exponents = [
            f"{what} {part['growth'][kind]:.2f}"
            for kind, what in (("forward", "forward"), ("both", "with backward"))
            if part["growth"][kind]
        ]
        if exponents:
            lines.append(f"Ours grows with the length to the power of {', '.join(exponents)} (from 1,024 positions on).")
        found = part["errors"]
        lines.append(
            f"Against the float64 recurrence at {ERROR_LENGTH} positions (largest difference over largest value, one group of heads): "
            + "; ".join(f"{way} y {e['y']:.1e}, worst gradient {e['gradient']:.1e} (of {e['of']})" for way, e in found.items())
            + "."
        )
        lines += ["", f"    {part['command']}"]
    return "\n".join([*lines, ""])


def earlier_parts(path: Path, result: dict) -> dict[str, dict]:
    """What stands in the result file already, by shape and dtype; nothing if it comes from another machine or other versions."""
    if not path.is_file():
        return {}
    earlier = json.loads(path.read_text(encoding="utf-8"))
    same = all(earlier.get(name) == result[name] for name in ("machine", "python", "torch", "transformers", "threads"))
    return {f"{part['shape']} {part['dtype']}": part for part in earlier["parts"]} if same else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--lengths", nargs="+", type=int, default=LENGTHS, help="positions, a row each")
    parser.add_argument("--longest-baseline", type=int, default=4096, help="positions; a pass of the fallback at 8,192 takes half a minute")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for the passes of a row; three passes of each kind at least")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="without ending; results/scan, or results/scan_exactness")
    parser.add_argument("--exactness", type=int, metavar="N", help="measure errors over N random shapes, and nothing else")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        what, shape, dtype, length, *rest = options.child
        dtype, length = getattr(torch, dtype), int(length)
        if what == "times":
            found = times(shape, length, dtype, rest[0].split(","), options.seconds)
        else:
            found = memory(shape, length, dtype, rest[0], rest[1] == "both") if what == "memory" else errors(shape, length, dtype)
        print(json.dumps(found))
        return

    def child(*arguments) -> dict:
        settings = ["--seconds", str(options.seconds), "--threads", str(options.threads)]
        command = [sys.executable, __file__, *settings, "--child", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": str(options.threads)})
        if done.returncode:
            raise SystemExit(f"{' '.join(map(str, arguments))}: {done.stderr.strip().splitlines()[-1:]}")
        return json.loads(done.stdout.splitlines()[-1])

    out = options.out or HERE / "results" / ("scan_exactness" if options.exactness else "scan")
    result = {
        "command": shown_command("scan.py"),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "threads": options.threads,
        "parts": [],
    }
    if options.exactness:
        result |= exactness(options.exactness)
        write_whole(out.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
        write_whole(out.with_suffix(".md"), exactness_page(result))
        print(exactness_page(result))
        return
    parts = earlier_parts(out.with_suffix(".json"), result)
    for shape in options.shapes:
        for dtype in options.dtypes:
            rows = measure_rows(shape, dtype, options, child)
            exponents = {kind: growth(rows, kind) for kind in ("forward", "both")}
            found = child("errors", shape, dtype, ERROR_LENGTH)
            part = {"shape": shape, "dtype": dtype, "command": result["command"], "rows": rows, "growth": exponents, "errors": found}
            parts[f"{shape} {dtype}"] = part
            result["parts"] = [parts[name] for name in sorted(parts)]
            # After each part: a long run that is stopped leaves what it has.
            write_whole(out.with_suffix(".json"), json.dumps(result, indent=2) + "\n")
            write_whole(out.with_suffix(".md"), page(result))
    print(page(result))


if __name__ == "__main__":
    main()
