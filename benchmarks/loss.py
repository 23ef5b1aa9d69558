"""Peak memory and time of the loss on supervised positions beside full logits, forward and backward.

    python benchmarks/loss.py                       writes benchmarks/results/loss.{md,json}
    python benchmarks/loss.py --vocabulary 8192 --out loss-result

One 13-tile sample: 3,400 positions, a vocabulary of 131,072, and as many answer tokens as a row says. "full logits" is what stock models
do: logits of every position, shifted, cross-entropy with ignored labels; it costs the same for any number of answer tokens and is measured
once. Each measurement is a process of its own. On a CPU its peak is `ru_maxrss` less the peak before, which holds weights, hidden states,
and a pass over nine positions (so the head's gradient too, which both ways make); on CUDA it is the allocator's peak less what was
allocated.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from result_files import write_results  # noqa: E402

from vlm.device import default_device  # noqa: E402
from vlm.loss import IGNORE_INDEX, supervised_loss  # noqa: E402


def full_logits_loss(hidden, head, labels):
    """The stock way: all logits in float32, then the shift."""
    logits = head(hidden).float()
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", ignore_index=IGNORE_INDEX)


def our_loss(hidden, head, labels):
    return supervised_loss(hidden, head, labels)[0].sum()


WAYS = {"full logits": full_logits_loss, "supervised positions": our_loss}


def measure(way: str, answers: int, options: argparse.Namespace) -> dict:
    """Run in the child process: extra peak bytes and seconds of one forward and backward pass, and the loss."""
    device = torch.device(options.device)
    dtype = getattr(torch, options.dtype)
    generator = torch.Generator().manual_seed(0)
    head = torch.nn.Linear(options.hidden, options.vocabulary, bias=False, device=device, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.randn(head.weight.shape, generator=generator) * options.hidden**-0.5)
    hidden = torch.randn(1, options.positions, options.hidden, generator=generator).to(device, dtype).requires_grad_()
    labels = torch.full((1, options.positions), IGNORE_INDEX, device=device)
    labels[0, -answers:] = torch.randint(0, options.vocabulary, (answers,), generator=generator).to(device)
    for tensor in (head.weight, hidden):
        tensor.grad = torch.zeros_like(tensor)  # gradients have their place before: they are the same in both ways
    WAYS[way](hidden[:, -9:], head, labels[:, -9:]).backward()  # the library's own buffers

    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    started = time.perf_counter()
    loss = WAYS[way](hidden, head, labels)
    loss.backward()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = time.perf_counter() - started
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"extra_bytes": peak - before, "seconds": seconds, "loss": loss.item()}


def page(result: dict) -> str:
    full = result["full logits"]
    lines = [
        "# The loss: supervised positions beside full logits",
        "",
        f"{result['positions']:,} positions, vocabulary {result['vocabulary']:,}, width {result['hidden']}, {result['dtype']}, forward and "
        f"backward, on {result['device']} ({result['machine']}, {result['threads']} threads, torch {result['torch']}).",
        "",
        "| loss | answer tokens | memory | time | memory beside full | time beside full |",
        "|---|---|---|---|---|---|",
        f"| full logits | any | {full['extra_bytes'] / 1e6:,.0f} MB | {full['seconds']:.2f} s | | |",
    ]
    for row in result["supervised positions"]:
        lines.append(
            f"| supervised positions | {row['answers']:,} | {row['extra_bytes'] / 1e6:,.0f} MB | {row['seconds']:.2f} s | "
            f"1/{full['extra_bytes'] / max(row['extra_bytes'], 1):,.1f} | 1/{full['seconds'] / row['seconds']:.1f} |"
        )
    first = result["supervised positions"][0]
    lines += [
        "",
        "Memory is above weights, hidden states and gradients, which both ways need. "
        f"Losses of {first['answers']} answer tokens: {full['loss']:.6f} and {first['loss']:.6f}.",
        "",
        f"    {result['command']}",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocabulary", type=int, default=131072)
    parser.add_argument("--positions", type=int, default=3400)
    parser.add_argument("--hidden", type=int, default=512, help="decoder width; the logits do not depend on it")
    parser.add_argument("--answers", type=int, nargs="+", default=[8, 64, 512, 3399], help="supervised tokens, a row each")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "loss")
    parser.add_argument("--child", nargs=2, metavar=("WAY", "ANSWERS"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.child:
        print(json.dumps(measure(options.child[0], int(options.child[1]), options)))
        return

    def run(way: str, answers: int) -> dict:
        child = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--child", way, str(answers)], capture_output=True, text=True, env=os.environ.copy()
        )
        if child.returncode:
            raise SystemExit(f"{way}, {answers} answers: {child.stderr.strip().splitlines()[-1:]}")
        return json.loads(child.stdout)

    full, ours = WAYS
    result = {
        "command": " ".join(["python benchmarks/loss.py", *sys.argv[1:]]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores" if options.device == "cpu" else torch.cuda.get_device_name(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": options.threads,
        "device": options.device,
        "dtype": options.dtype,
        "vocabulary": options.vocabulary,
        "positions": options.positions,
        "hidden": options.hidden,
        full: run(full, options.answers[0]),
        ours: [{"answers": answers} | run(ours, answers) for answers in options.answers],
    }
    write_results(options.out, result, page(result))


if __name__ == "__main__":
    main()
