"""From nothing to a small Nemotron-H that sees, on a laptop: scenes, model, training, evaluation, report.

    make quickstart [MINUTES=15]        python -m train_vlm.quickstart [--minutes 15] [--out runs/quickstart]

It runs the other programs as a user would and shows each command. A finished step leaves a receipt; a second start, or a start after a
kill, reuses what is finished and whose command and inputs are the same. MINUTES is the time for all of it on a fresh machine: what the
installation, scenes, evaluation and start-ups need is taken off, training gets the rest.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path

from train_vlm.quickstart_report import print_scores, write_report
from train_vlm.quickstart_steps import ROOT, Step, accelerator, run_steps
from train_vlm.recipe import load_recipe
from train_vlm.run_lock import only_one
from train_vlm.scenes.llava_files import SHORT_ANSWER, VIZWIZ_SHORT_ANSWER

__all__ = ["main", "plan"]

RECIPES = Path(__file__).with_name("recipes")
OTHER_MINUTES = 4.5  # installation, scenes, model, shards, start-ups, six evaluations and the report, on two cores
TASKS = ("vqav2", "gqa", "vizwiz")
# A narrow residual network with features every 8 px; from scratch it learns colours before a small ViT does (docs/decisions.md).
ENCODER = ("--vision-encoder", "timm:resnet10t", "--vision-setting", "image_size=64", "--vision-setting", "output_stride=8",
           "--vision-setting", "channels=[32,48,96,96]", "--vision-setting", "stem_width=16")  # fmt: skip


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
                   str(models["assembled"]), "--out", str(shards / file.stem), "--workers", "0") for file in texts.values()),
            tuple(shards / name / "summary.json" for name in texts),
            ("scenes", "assemble"),
        ),
    ]  # fmt: skip
    before = "assembled"
    stages = (
        ("captions", "sft.py", ["captions", "captions", "questions"]),
        ("align", "align.py", ["captions"]),
        ("early", "sft.py", ["questions", "questions", "captions"]),
        ("sft", "sft.py", ["late_questions", "late_questions", "questions", "captions"]),
    )
    # The recipes say how long each stage is beside the others.
    usual = {stage: load_recipe(RECIPES / f"quickstart_{stage}.yaml").run.minutes for stage, _, _ in stages}
    for stage, program, sources in stages:
        overrides = {
            "model": str(models[before]),
            "out": str(models[stage]),
            "run.minutes": round(training * usual[stage] / sum(usual.values()), 2),
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

    ranks = options.ranks or (torch.cuda.device_count() if accelerator() == "cuda" else min(2, os.cpu_count() or 1))
    pictures = options.pictures or int(min(40000, max(2000, 600 * options.minutes)))
    started = time.monotonic()
    try:
        steps = plan(options.out, options.minutes, pictures=pictures, heldout=options.heldout, ranks=ranks, seed=options.seed)
        with only_one(options.out):
            receipts = run_steps(steps, options.out)
            page = write_report(options.out, receipts, minutes=options.minutes)
    except (RuntimeError, ValueError, OSError) as error:
        print(f"quickstart: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nquickstart: stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print_scores(options.out)
    print(
        f"\n{time.monotonic() - started:.0f} s. Report: {page}\n"
        f"Talk to it: make demo    (python demo/app.py --model {options.out / 'model'})"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
