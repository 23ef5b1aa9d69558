"""The same training run in BF16 and in FP8: loss curves and their gap; on a GPU with FP8 units also the time of 8B-shaped layers.

    python benchmarks/fp8.py                        writes benchmarks/results/fp8.{md,json,svg}
    python benchmarks/fp8.py --steps 20 --pictures 40 --out fp8-result

Both runs are the trainer's own (train_vlm/trainer.py, guard included): the tiny preset from random weights, on captions of drawn pictures,
same seed and order. Without a GPU products are emulated, FP8 and BF16 alike: the same roundings, multiplied in float32. Two more runs: one
with every product in FP8 that fits, the first and last ones too; one in float32, to see how far another rounding alone leads. The loss is
smoothed as the trainer does it (0.95 of the value before); the gap is its distance to BF16's, divided by that. Ends with 1 when FP8's gap
is above the bound at any step.
"""

import argparse
import contextlib
import json
import os
import platform
import socket
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from fp8_layers import measure_layers, why_not  # noqa: E402
from fp8_products import Float32Products  # noqa: E402
from shown_command import shown_command  # noqa: E402

from train_vlm.conversations import read_llava  # noqa: E402
from train_vlm.fp8_section import Fp8  # noqa: E402
from train_vlm.recipe import Data, Optimizer, Parts, Recipe, Run, Source  # noqa: E402
from train_vlm.scenes.__main__ import write_scenes  # noqa: E402
from train_vlm.shards import convert  # noqa: E402
from train_vlm.trainer import train  # noqa: E402
from vlm.assemble import assemble  # noqa: E402
from vlm.checkpoint import save_model  # noqa: E402
from vlm.decoder import preset_config  # noqa: E402
from vlm.files import write_whole  # noqa: E402
from vlm.report.curves import curves_svg  # noqa: E402

BOUND_PERCENT = 1.0
RUNS = {
    "BF16": ("bfloat16", Fp8()),
    "FP8": ("bfloat16", Fp8(enabled=True)),
    "FP8 everywhere": ("bfloat16", Fp8(enabled=True, skip_first=0, skip_last=0)),
    "float32": ("float32", Fp8()),
}


def make_inputs(folder: Path, pictures: int) -> None:
    """FOLDER/model and FOLDER/shards, from nothing, unless they are there."""
    if (folder / "shards" / "summary.json").is_file():
        return
    write_scenes(folder / "scenes", train=pictures, heldout=1, seed=0, workers=1, is_quiet=True)
    captions = folder / "scenes" / "train" / "captions.json"
    model, processor = assemble("tiny", tokenizer_corpus=[str(captions)], seed=0)
    save_model(model, processor, folder / "model")
    convert(read_llava(captions), captions.parent, processor, folder / "shards")


def run(folder: Path, name: str, options: argparse.Namespace) -> dict:
    """Train once; losses of every step, their smoothed course, seconds a step, and what the guard measured."""
    precision, fp8 = RUNS[name]
    recipe = Recipe(
        stage="sft", model=str(folder / "model"), out=str(folder / name), parts=Parts(1e-3, None, 1e-3, 1e-3),
        data=Data(sources=(Source(str(folder / "shards"), at_most_tiles=1),), batch_samples=options.batch, workers=0),
        optimizer=Optimizer(warmup=0.05),
        run=Run(steps=options.steps, precision=precision, log_every=1, save_every_minutes=0.5, threads_per_rank=options.threads),
    )  # fmt: skip
    with contextlib.nullcontext() if torch.cuda.is_available() else Float32Products():
        train(replace(recipe, fp8=replace(fp8, guard_every=max(1, options.steps // 3))))
    log = folder / f"{name}.log"
    lines = [json.loads(line) for line in (log / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    summary = json.loads((log / "summary.json").read_text(encoding="utf-8"))
    return {
        "losses": [round(line["loss"], 5) for line in lines if "event" not in line],
        "smooth": [line["smooth_loss"] for line in lines if "event" not in line],
        "guard": [{key: line[key] for key in ("step", "text")} for line in lines if "event" in line],
        "layers": summary["fp8"],
    }


def gaps(found: list[float], reference: list[float]) -> list[float]:
    """Percent, at every step."""
    return [100.0 * (a - b) / b for a, b in zip(found, reference, strict=True)]


def compare(runs: dict[str, dict]) -> dict:
    """{run: percent of BF16's smoothed loss: at the end, the largest and the mean distance over all steps}."""
    result = {}
    for name in runs.keys() - {"BF16"}:
        course = gaps(runs[name]["smooth"], runs["BF16"]["smooth"])
        distances = [abs(value) for value in course]
        result[name] = {"end": course[-1], "largest": max(distances), "mean": sum(distances) / len(distances)}
    return result


def page(result: dict) -> str:
    lines = [
        "# FP8 beside BF16", "",
        f"{result['steps']} steps of {result['batch']} captions, the tiny preset from random weights, everything trained "
        f"({result['machine']}, {result['threads']} threads, torch {result['torch']}, torchao {result['torchao']}; FP8 "
        f"{'emulated in float32' if result['emulated'] else 'on FP8 units'}).", "",
        "| run | loss, smoothed, at the end | gap to BF16 at the end | largest gap | mean gap |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, found in result["runs"].items():
        gap = result["gaps"].get(name)
        cells = [f"{gap['end']:+.2f} %", f"{gap['largest']:.2f} %", f"{gap['mean']:.2f} %"] if gap else ["", "", ""]
        lines.append(f"| {name} | {found['smooth'][-1]:.4f} | {' | '.join(cells)} |")
    lines += ["", f"Gaps are of the smoothed loss, largest and mean over all steps. Bound: FP8 at most {BOUND_PERCENT:g} %: "
              f"**{'held' if result['held'] else 'not held'}**. float32 stands beside it for what another rounding alone does.", "",
              f"![loss curves]({result['picture']})", "", "## Layers", "", "| place | weight | shape | state (guard, last) |",
              "|---|---|---|---|"]  # fmt: skip
    lines += ["| " + " | ".join(row) + " |" for row in result["runs"]["FP8"]["layers"]]
    lines += ["", *(f"- {event['text']}" for event in result["runs"]["FP8"]["guard"]), "", "## 8B-shaped layers on a GPU", ""]
    speed = result["speed"]
    if "skipped" in speed:
        lines.append(f"Not measured: {speed['skipped']}.")
    else:
        share = f"{speed['bf16_mfu_percent']:.1f} % MFU" if speed["bf16_mfu_percent"] else "MFU unknown"
        lines.append(
            f"{speed['device']}, {speed['parameters'] / 1e9:.2f} B parameters, {len(speed['sequences'])} sequences of "
            f"{speed['sequences'][0]}, forward and backward: BF16 {speed['bf16_seconds']:.3f} s ({share}), FP8 {speed['fp8_seconds']:.3f} "
            f"s, ratio **{speed['ratio']:.2f}**."
        )
    return "\n".join([*lines, "", f"    {result['command']}", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=4, help="captions a step")
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pattern", help="layers of the 8B shape to time on a GPU (default: all of the 8B model)")
    parser.add_argument("--sequences", type=int, nargs="+", default=[2048] * 4, help="their lengths, in tokens")
    parser.add_argument("--work", type=Path, help="folder to keep data and runs in: started again, it goes on (default: a temporary one)")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "fp8", help="path of the results, without ending")
    options = parser.parse_args()
    if options.steps < 1 or options.batch < 1 or options.pictures < options.batch:
        parser.error(f"found {options.steps} steps of {options.batch} of {options.pictures} pictures; expected 1 or more")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        os.environ.setdefault("MASTER_PORT", str(server.getsockname()[1]))
    import torchao

    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        make_inputs(folder, options.pictures)
        runs = {name: run(folder, name, options) for name in RUNS}
    torch.distributed.destroy_process_group()
    reason, found = why_not(), compare(runs)
    config = preset_config("8b", **({"pattern": options.pattern} if options.pattern else {}))
    result = {
        "command": shown_command("fp8.py"), "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(), "torch": torch.__version__, "torchao": torchao.__version__, "threads": options.threads,
        "steps": options.steps, "batch": options.batch, "emulated": reason is not None, "gaps": found,
        "held": found["FP8"]["largest"] <= BOUND_PERCENT, "runs": runs,
        "picture": options.out.with_suffix(".svg").name,
        "speed": {"skipped": reason} if reason else measure_layers(config, options.sequences, "cuda"),
    }  # fmt: skip
    curves = {name: list(enumerate(found["smooth"], 1)) for name, found in runs.items()}
    write_whole(options.out.with_suffix(".svg"), curves_svg(curves, "step", "loss, smoothed", log_y=True))
    write_whole(options.out.with_suffix(".json"), json.dumps(result) + "\n")
    write_whole(options.out.with_suffix(".md"), page(result))
    print(page(result))
    return 0 if result["held"] else 1


if __name__ == "__main__":
    sys.exit(main())
