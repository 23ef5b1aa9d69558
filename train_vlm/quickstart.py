"""From nothing to a small Nemotron-H that sees, on a laptop: scenes, model, training, evaluation, report.

    make quickstart [MINUTES=15]        python -m train_vlm.quickstart [--minutes 15] [--out runs/quickstart]

It runs the other programs as a user would and shows each command. A finished step leaves a receipt; a second start, or a start after a
kill, reuses what is finished and whose command and inputs are the same. MINUTES is the time for all of it (without the installation): what
scenes, evaluation and start-ups need is taken off, training gets the rest.
"""

import argparse
import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from train_vlm.quickstart_report import print_scores, write_report
from train_vlm.scenes.llava_files import SHORT_ANSWER, VIZWIZ_SHORT_ANSWER
from vlm.files import write_whole

__all__ = ["Step", "main", "plan", "run_steps"]

RECIPES = Path(__file__).with_name("recipes")
ROOT = Path(__file__).resolve().parent.parent
OTHER_MINUTES = 3.5  # scenes, model, shards, start-ups, six evaluations and the report, on two cores
SHARES = {"captions": 0.26, "align": 0.02, "early": 0.36, "sft": 0.36}  # of the training time
TASKS = ("vqav2", "gqa", "vizwiz")
# A narrow residual network with features every 8 px; from scratch it learns colours before a small ViT does (docs/decisions.md).
ENCODER = ("--vision-encoder", "timm:resnet10t", "--vision-setting", "image_size=64", "--vision-setting", "output_stride=8",
           "--vision-setting", "channels=[32,48,96,96]", "--vision-setting", "stem_width=16")  # fmt: skip


@dataclass(frozen=True)
class Step:
    """name; commands, run side by side; makes: what must exist afterwards; needs: earlier steps whose receipts this one depends on.
    goes_on_from: folders in which a stopped run of the same command finds what it had; those of another command are removed."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    makes: tuple[Path, ...]
    needs: tuple[str, ...] = ()
    goes_on_from: tuple[Path, ...] = ()


def _launch(ranks: int, program: str, recipe: str, overrides: dict) -> tuple[str, ...]:
    launcher = Path(sys.executable).with_name("deepspeed")
    pairs = [f"{key}={json.dumps(value) if not isinstance(value, str) else value}" for key, value in overrides.items()]
    return (
        str(launcher),
        "--num_gpus",
        str(ranks),
        "--master_port",
        "{free_port}",
        str(ROOT / "train_vlm" / program),
        "--recipe",
        str(RECIPES / recipe),
        *pairs,
    )


def plan(out: Path, minutes: float, *, pictures: int, heldout: int, ranks: int, seed: int = 0) -> list[Step]:
    """The steps of a quickstart, first to last."""
    python = (sys.executable, "-m")
    scenes, shards = out / "scenes", out / "shards"
    texts = {name: scenes / "train" / f"{name}.json" for name in ("captions", "questions", "late_questions")}
    training = max(0.5, minutes - OTHER_MINUTES)
    models = {name: out / f"model-{name}" for name in ("assembled", "captions", "align", "early")} | {"sft": out / "model"}
    steps = [
        Step(
            "scenes",
            ((*python, "train_vlm.scenes", "--out", str(scenes), "--train", str(pictures), "--heldout", str(heldout), "--seed", str(seed),
              "--workers", str(ranks)),),
            (scenes / "summary.json",),
        ),
        Step(
            "assemble",
            ((*python, "vlm.assemble", "--preset", "tiny", *ENCODER,
              *(part for text in texts.values() for part in ("--tokenizer-corpus", str(text))),
              "--tokenizer-phrase", f"\n{SHORT_ANSWER}", "--tokenizer-phrase", f"\n{VIZWIZ_SHORT_ANSWER}",
              "--seed", str(seed), "--out", str(models["assembled"])),),
            (models["assembled"] / "config.json",),
            ("scenes",),
        ),
        Step(
            "shards",
            tuple((*python, "train_vlm.shards", "convert", "--llava", str(file), "--images", str(scenes / "train"), "--model",
                   str(models["assembled"]), "--out", str(shards / file.stem)) for file in texts.values()),
            tuple(shards / name / "summary.json" for name in texts),
            ("scenes", "assemble"),
        ),
    ]  # fmt: skip
    before = "assembled"
    for stage, program, sources in (
        ("captions", "sft.py", ["captions", "captions", "questions"]),
        ("align", "align.py", ["captions"]),
        ("early", "sft.py", ["questions", "questions", "captions"]),
        ("sft", "sft.py", ["late_questions", "late_questions", "questions", "captions"]),
    ):
        overrides = {
            "model": str(models[before]),
            "out": str(models[stage]),
            "run.minutes": round(training * SHARES[stage], 2),
            "run.seed": seed,
        }
        overrides |= {f"data.sources.{number}.shards": str(shards / source) for number, source in enumerate(sources)}
        command = _launch(ranks, program, f"quickstart_{stage}.yaml", overrides)
        needs = ("shards", "assemble") if before == "assembled" else ("shards", steps[-1].name)
        remains = tuple(models[stage].with_name(models[stage].name + ending) for ending in ("", ".log", ".checkpoints"))
        steps.append(Step(f"train: {stage}", (command,), (models[stage] / "config.json",), needs, remains))
        before = stage
    for task in TASKS:
        runs = tuple(
            (sys.executable, str(ROOT / "eval_vqa" / f"{task}.py"), "run", "--model", str(models["sft"]),
             "--data", str(scenes / "heldout" / task),
             "--out", str(out / "eval" / (task + suffix)), *flags)
            for suffix, flags in (("", ()), ("-grey", ("--grey",)))
        )  # fmt: skip
        steps.append(
            Step(
                f"evaluate: {task}",
                runs,
                tuple(out / "eval" / (task + suffix) / "scores.json" for suffix in ("", "-grey")),
                ("train: sft", "scenes"),
            )
        )
    majority = scenes / "train" / "vqav2" / "v2_mscoco_train2014_annotations.json"
    steps.append(Step(
        "baselines",
        tuple((sys.executable, str(ROOT / "eval_vqa" / f"{task}.py"), "baseline", "--train", str(majority),
               "--data", str(scenes / "heldout" / task),
               "--out", str(out / "eval" / f"{task}-majority.json")) for task in TASKS),
        tuple(out / "eval" / f"{task}-majority.json" for task in TASKS),
        ("scenes",),
    ))  # fmt: skip
    return steps


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class _PeakMemory(threading.Thread):
    """Largest memory of this process and its children together, in bytes (shared pages counted once), sampled every second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak_bytes, self._stopped = 0, threading.Event()

    def run(self):
        own = psutil.Process()
        while not self._stopped.wait(1.0):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    memory = process.memory_full_info()
                    total += getattr(memory, "pss", memory.rss)
                except psutil.Error:
                    continue  # ended between listing and asking
            self.peak_bytes = max(self.peak_bytes, total)

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return self.peak_bytes


def _environment(side_by_side: int) -> dict:
    environment = dict(os.environ)
    environment.setdefault("DS_ACCELERATOR", "cuda" if shutil.which("nvidia-smi") else "cpu")
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's large buffers in large pages
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // max(1, side_by_side))))
    return environment


def _fingerprint(step: Step, receipts: dict[str, dict]) -> str:
    recipes = {part: Path(part).read_text(encoding="utf-8") for command in step.commands for part in command if part.endswith(".yaml")}
    known = [[list(command) for command in step.commands], recipes, [receipts[name]["fingerprint"] for name in step.needs]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def run_steps(steps: list[Step], out: Path) -> dict[str, dict]:
    """Run what has no valid receipt. Returns {step: {"fingerprint", "seconds", "peak_bytes", "reused"}}.

    Raises RuntimeError, naming the log, when a command fails.
    """
    receipts: dict[str, dict] = {}
    for number, step in enumerate(steps, 1):
        file = out / "receipts" / (step.name.replace(": ", "-") + ".json")
        fingerprint = _fingerprint(step, receipts)
        if file.is_file():
            receipt = json.loads(file.read_text(encoding="utf-8"))
            if receipt["fingerprint"] == fingerprint and all(path.exists() for path in step.makes):
                receipts[step.name] = receipt | {"reused": True}
                print(f"[{number}/{len(steps)}] {step.name}: finished before ({receipt['seconds']:.0f} s)", flush=True)
                continue
            file.unlink()
        print(f"[{number}/{len(steps)}] {step.name}", flush=True)
        begun = file.with_suffix(".begun")
        if step.goes_on_from and not (begun.is_file() and begun.read_text(encoding="utf-8") == fingerprint):
            for folder in step.goes_on_from:
                shutil.rmtree(folder, ignore_errors=True)
            write_whole(begun, fingerprint)
        started, memory = time.monotonic(), _PeakMemory()
        memory.start()
        side_by_side = len(step.commands) if not step.name.startswith(("train", "scenes")) else 2
        running = []
        (out / "logs").mkdir(parents=True, exist_ok=True)
        for place, command in enumerate(step.commands):
            command = tuple(part.replace("{free_port}", _free_port()) for part in command)
            print(f"    {shlex.join(_short(part) for part in command)}", flush=True)
            log = out / "logs" / (step.name.replace(": ", "-") + (f"-{place}" if len(step.commands) > 1 else "") + ".log")
            # One command: its bar is shown. Several side by side: their output goes to files, or they would write over each other.
            handle = None if len(step.commands) == 1 else open(log, "w", encoding="utf-8")  # noqa: SIM115
            process = subprocess.Popen(command, env=_environment(side_by_side), stdout=handle, stderr=handle)
            running.append((process, handle, log, command))
        failed = None
        for process, handle, log, command in running:
            code = process.wait()
            if handle:
                handle.close()
            if code and failed is None:
                tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if handle else []
                failed = f"{step.name} failed with exit code {code}: {shlex.join(_short(part) for part in command)}" + "".join(
                    f"\n    {line}" for line in tail
                )
        peak = memory.stop()
        if failed:
            raise RuntimeError(failed)
        missing = [str(path) for path in step.makes if not path.exists()]
        if missing:
            raise RuntimeError(f"{step.name} ended without making {', '.join(missing)}")
        receipts[step.name] = {
            "fingerprint": fingerprint,
            "seconds": round(time.monotonic() - started, 1),
            "peak_bytes": peak,
            "reused": False,
        }
        write_whole(file, json.dumps(receipts[step.name]))
        print(f"    {receipts[step.name]['seconds']:.0f} s, {peak / 2**30:.1f} GB", flush=True)
    return receipts


def _short(part: str) -> str:
    """Paths as one would type them in the project's folder."""
    if part == sys.executable:
        return "python"
    if Path(part).name == "deepspeed":
        return "deepspeed"
    for place, _, rest in (part.partition(str(ROOT) + os.sep),):
        if rest:
            return place + rest
    return part


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m train_vlm.quickstart", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=15.0, help="time for everything (default 15)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="folder for all it makes (default runs/quickstart)")
    parser.add_argument("--pictures", type=int, help="training pictures (default: as many as the time needs)")
    parser.add_argument("--heldout", type=int, default=2000, help="questions at least in each held-out set (default 2000)")
    parser.add_argument("--ranks", type=int, help="training processes (default: GPUs, or up to two on the CPU)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        print(f"quickstart: --minutes is {options.minutes}; expected more than 0", file=sys.stderr)
        return 2
    import torch

    ranks = options.ranks or torch.cuda.device_count() or min(2, os.cpu_count() or 1)
    pictures = options.pictures or int(min(40000, max(2000, 600 * options.minutes)))
    started = time.monotonic()
    try:
        steps = plan(options.out, options.minutes, pictures=pictures, heldout=options.heldout, ranks=ranks, seed=options.seed)
        receipts = run_steps(steps, options.out)
        page = write_report(options.out, receipts, minutes=options.minutes)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    print_scores(options.out)
    print(
        f"\n{time.monotonic() - started:.0f} s. Report: {page}\n"
        f"Talk to it: make demo    (python demo/app.py --model {options.out / 'model'})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
