"""Tokens a second of real work, and peak memory, of training beside a plain loop; and what each of our parts brings.

    python benchmarks/train.py                       writes benchmarks/results/train.{md,json}
    python benchmarks/train.py --models tiny --out train-result

Two models. "tiny": the quickstart's model, blend and samples a step (the first half of its fine-tuning) on drawn scenes, everything
trained. "hybrid": a Nemotron-H body of some 60 M parameters (width 512) with a vocabulary of 131,072, a frozen ViT-tiny at 224 px, 64
visual tokens a tile, 1 to 13 tiles a sample; everything but the encoder trained. Every way sees the same samples, packed or padded, with
the same weights, optimizer (AdamW) and threads, in a process of its own; each switches one thing on over the one before (train_work.py). A
token is a position of a sample, text or visual: padding is no work. Reading and tiling are done before the clock starts, for all. Peak
memory is that of the whole process. Ways take turns in rounds, three for tiny (processes of one way differ by a twentieth, by where their
memory lies) and one for the hybrid, which takes minutes; the fastest round of each counts. Seconds are those of the process on its
processor: with the one thread of the default, what it takes on a machine with nothing else to do; wall seconds and the machine's load
stand in the JSON file.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402
import transformers  # noqa: E402
from result_files import write_results  # noqa: E402
from train_work import SAMPLES, WAYS  # noqa: E402

from train_vlm.quickstart import ENCODER  # noqa: E402

STEPS = {"tiny": 12, "hybrid": 2}
ROUNDS = {"tiny": 3, "hybrid": 1}
BARS = {"tiny": {"any precision": 2.0, "float32": 2.0}, "hybrid": {"float32": 2.0, "both": 3.0}}
QUIET = {"DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(HERE.parent)}


def has_bfloat16_units() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones, by its own flags."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return False
    return any(flag in flags for flag in ("avx512_bf16", "amx_bf16", " bf16 "))


def run(*command: str, threads: int = 1) -> str:
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env=os.environ | QUIET | {"OMP_NUM_THREADS": str(threads)}
    )
    if done.returncode:
        raise SystemExit(f"train: {' '.join(command)} ended with {done.returncode}: {done.stderr.strip()[-800:]}")
    return done.stdout


def build_tiny(folder: Path, pictures: int) -> None:
    """The quickstart's scenes, model and shards beside each other."""
    scenes = folder.parent / "scenes"
    run("-m", "train_vlm.scenes", "--out", str(scenes), "--train", str(pictures), "--heldout", "4")
    texts = [str(scenes / "train" / f"{name}.json") for name in ("captions", "questions")]
    run("-m", "vlm.assemble", "--preset", "tiny", *ENCODER, *(part for text in texts for part in ("--tokenizer-corpus", text)),
        "--out", str(folder))  # fmt: skip
    for text in texts:
        run("-m", "train_vlm.shards", "convert", "--llava", text, "--images", str(scenes / "train"), "--model", str(folder),
            "--out", str(folder.parent / "shards" / Path(text).stem))  # fmt: skip


def measure(name: str, folder: Path, ways: list[str], options) -> dict:
    rows, rounds = {}, options.rounds or ROUNDS[name]
    for number, way in ((number, way) for number in range(rounds) for way in ways):
        found = json.loads(
            run(str(HERE / "train_work.py"), way, str(folder), str(options.steps or STEPS[name]), threads=options.threads).splitlines()[-1]
        )
        found |= {
            "tokens_per_second": found["tokens"] / found["cpu_seconds"],
            "tiles_per_second": found["tiles"] / found["cpu_seconds"],
            "load": os.getloadavg()[0],
        }
        every = [*rows.get(way, {}).get("rounds", []), found["tokens_per_second"]]
        if way not in rows or found["tokens_per_second"] > rows[way]["tokens_per_second"]:
            rows[way] = found
        rows[way]["rounds"] = every
        said = f"{name}, {way}: {every[-1]:,.0f} tokens/s, {found['peak_bytes'] / 1e9:.2f} GB ({number + 1} of {rounds})"
        print(said, file=sys.stderr, flush=True)
    first = rows[ways[0]]["losses"][0]
    for way, row in rows.items():
        if abs(row["losses"][0] - first) > (0.05 if "bfloat16" in way else 2e-3) * first:
            raise SystemExit(
                f"train: {name}, {way}: the first loss is {row['losses'][0]:.4f}, {ways[0]} has {first:.4f}: not the same training"
            )
    return {"samples": SAMPLES[name], "steps": options.steps or STEPS[name], "rounds": rounds, "ways": rows}


def verdicts(result: dict) -> list[str]:
    """A line for each bar. Speed and memory of the hybrid have to hold for one and the same way."""
    lines = []
    for name, part in result["models"].items():
        ways = part["ways"]
        trainers = [way for way in ways if way.startswith("trainer")]
        if "plain" not in ways or not trainers:
            continue
        speed = {way: ways[way]["tokens_per_second"] / ways["plain"]["tokens_per_second"] for way in trainers}
        memory = {way: ways["plain"]["peak_bytes"] / ways[way]["peak_bytes"] for way in trainers}
        bars = BARS[name]
        for which in ("any precision", "float32"):
            if which in bars:
                best = max((way for way in trainers if which in ("any precision", way.split(", ")[1])), key=speed.get)
                word = _word(speed[best] >= bars[which])
                lines.append(f"- {name}, {which}, speed of {best}: {speed[best]:.2f}x, wanted {bars[which]:.0f}x: {word}")
        if "both" in bars:
            best = max(trainers, key=lambda way: min(speed[way], memory[way]))
            holds = min(speed[best], memory[best]) >= bars["both"]
            lines.append(f"- {name}, {best}: speed {speed[best]:.2f}x at 1/{memory[best]:.2f} of the memory, wanted {bars['both']:.0f}x at "
                         f"1/{bars['both']:.0f}: {_word(holds)}")  # fmt: skip
    return lines


def _word(holds: bool) -> str:
    return "holds" if holds else "MISSED"


def page(result: dict) -> str:
    out = ["# Training beside a plain loop", "", f"    {result['command']}", "",
           f"{result['machine']}, {result['threads']} thread(s), torch {result['torch']}, transformers {result['transformers']}; "
           f"{result['bfloat16']}. {result['seconds']:.0f} s in all.", ""]  # fmt: skip
    for name, part in result["models"].items():
        ways = part["ways"]
        first = next(iter(ways.values()))
        out += [f"## {name}", "", f"{part['steps']} step(s) of {part['samples']} samples, the fastest of {part.get('rounds', 1)} round(s): "
                f"{first['tokens']:,} tokens ({first['padded_tokens']:,} with padding), {first['supervised_tokens']:,} supervised, "
                f"{first['tiles']} tiles.", "",
                "| way | tokens a processor second | beside plain | beside the row above | peak memory, GB | plain over this |",
                "|---|---:|---:|---:|---:|---:|"]  # fmt: skip
        above = first
        for way, row in ways.items():
            speed = row["tokens_per_second"]
            out.append(f"| {way} | {speed:,.0f} | {speed / first['tokens_per_second']:.2f}x | {speed / above['tokens_per_second']:.2f}x | "
                       f"{row['peak_bytes'] / 1e9:.2f} | {first['peak_bytes'] / row['peak_bytes']:.2f} |")  # fmt: skip
            above = row
        out.append("")
    return "\n".join([*out, *verdicts(result), ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--steps", type=int, help="measured steps, in place of 12 (tiny) and 2 (hybrid)")
    parser.add_argument("--rounds", type=int, help="in place of 3 (tiny) and 1 (hybrid)")
    parser.add_argument("--threads", type=int, default=1, help="of each process; with one, other work on the machine disturbs least")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "train")
    options = parser.parse_args()
    began = time.monotonic()
    given = [f"--models {' '.join(options.models)}"] if len(options.models) < len(STEPS) else []
    given += [f"--{name} {value}" for name in ("steps", "rounds") if (value := getattr(options, name))]
    ways = [way for way in options.ways if "bfloat16" not in way or has_bfloat16_units()]
    result = {
        "command": " ".join(["python benchmarks/train.py", *given]),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}",
        "bfloat16": "bfloat16 units" if has_bfloat16_units() else "no bfloat16 units, so bfloat16 is left out",
        "python": platform.python_version(), "torch": torch.__version__, "transformers": transformers.__version__,
        "threads": options.threads, "models": {},
    }  # fmt: skip
    kept = options.out.with_suffix(".json")
    if len(options.models) < len(STEPS) and kept.is_file():  # the other model stays as it was measured
        result["models"] = json.loads(kept.read_text(encoding="utf-8"))["models"]
    with tempfile.TemporaryDirectory() as temporary:
        for name in options.models:
            folder = Path(temporary) / name
            if name == "tiny":
                build_tiny(folder, pictures=SAMPLES[name] * ((options.steps or STEPS[name]) + 1) + 8)
            chosen = [way for way in ways if name == "hybrid" or "lean" not in way]  # the tiny model's activations are no burden
            result["models"][name] = measure(name, folder, chosen, options)
    result["seconds"] = time.monotonic() - began
    write_results(options.out, result, page(result))
    return 1 if any("MISSED" in line for line in verdicts(result)) else 0


if __name__ == "__main__":
    sys.exit(main())
