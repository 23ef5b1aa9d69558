"""What a message between the ranks of one host costs amid a step's products: through gloo, and through pages that the ranks share.

    python benchmarks/gather.py                     writes benchmarks/results/gather.{md,json}

Every rank multiplies matrices for some milliseconds, then all gather, as BatchNorm over ranks does in each of its layers, and as Muon does
with its updates. The ways take turns. Milliseconds within the gather, which includes waiting for the slower rank: for all of them alike.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from result_files import write_results  # noqa: E402
from shown_command import shown_command  # noqa: E402

from vision_encoders.gathering import gather_over_ranks  # noqa: E402

MESSAGES = {"two sums of 100 channels, float64": (201, torch.float64, 200), "half of Muon's updates, float32": (530_000, torch.float32, 40)}
ROUNDS = 5


def through_gloo(own: torch.Tensor) -> torch.Tensor:
    every = own.new_empty(dist.get_world_size(), len(own))
    dist.all_gather(list(every.unbind(0)), own)
    return every


WAYS = {"gloo": through_gloo, "shared pages": gather_over_ranks}


def measure(store: str, rank: int, ranks: int) -> list[dict]:
    """In the process of one rank: milliseconds of each message, by message and way; the answers of both ways are the same."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    a, b, rows = torch.randn(300, 128), torch.randn(128, 512), []
    for message, (count, dtype, times) in MESSAGES.items():
        own, spent = torch.randn(count, dtype=dtype), {way: [] for way in WAYS}
        assert torch.equal(*(gather(own) for gather in WAYS.values()))
        for _ in range(ROUNDS):
            for way, gather in WAYS.items():
                dist.barrier()
                for _ in range(times):
                    for _ in range(6):
                        a @ b
                    begun = time.perf_counter()
                    gather(own)
                    spent[way].append((time.perf_counter() - begun) * 1e3)
        rows += [{"message": message, "bytes": own.numel() * own.element_size(), "way": way, "mean_ms": statistics.mean(each),
                  "median_ms": statistics.median(each)} for way, each in spent.items()]  # fmt: skip
    return rows


def page(result: dict) -> str:
    lines = [
        "# Messages between the ranks of one host",
        "",
        f"{result['ranks']} ranks of one thread on {result['machine']}, torch {result['torch']}; after every 2.4 ms or so of products.",
        "",
        "| message | bytes a rank | way | mean, ms | median, ms | mean beside gloo |",
        "|---|---:|---|---:|---:|---:|",
    ]
    gloo = {row["message"]: row["mean_ms"] for row in result["rows"] if row["way"] == "gloo"}
    for row in result["rows"]:
        ratio = "" if row["way"] == "gloo" else f"1/{gloo[row['message']] / row['mean_ms']:.1f}"
        figures = f"{row['mean_ms']:.2f} | {row['median_ms']:.2f} | {ratio}"
        lines.append(f"| {row['message']} | {row['bytes']:,} | {row['way']} | {figures} |")
    return "\n".join([*lines, "", f"    {result['command']}", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gather")
    parser.add_argument("--child", nargs=2, metavar=("STORE", "RANK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        rows = measure(options.child[0], int(options.child[1]), options.ranks)
        if options.child[1] == "0":
            print(json.dumps(rows))
        return
    with tempfile.TemporaryDirectory() as temporary:
        children = [
            subprocess.Popen([sys.executable, __file__, "--ranks", str(options.ranks), "--child", f"{temporary}/store", str(rank)],
                             stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
            for rank in range(options.ranks)
        ]  # fmt: skip
        said = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit("a rank failed; what it says stands above")
    result = {
        "command": shown_command("gather.py"), "machine": f"{platform.machine()}, {os.cpu_count()} cores", "torch": torch.__version__,
        "python": platform.python_version(), "ranks": options.ranks, "rows": json.loads(said[0]),
    }  # fmt: skip
    write_results(options.out, result, page(result))


if __name__ == "__main__":
    main()
