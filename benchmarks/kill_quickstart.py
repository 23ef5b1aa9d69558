"""kill -9 at random moments of a quickstart: does the same command, given again, end with everything whole, and nothing left running?

    python benchmarks/kill_quickstart.py                   writes benchmarks/results/kill_quickstart.{md,json}

A small quickstart is started again and again and killed a random time after one of its steps has begun: by turns all of its processes, and
the quickstart alone, as a user's `kill -9` does. The next start comes at once. At last it is left alone. Scenes, shards and the assembled
model are compared with those of a run that nobody disturbed; training by the clock cannot be, so its stages have to be finished, each
question answered once, and the report complete.
"""

import argparse
import atexit
import hashlib
import json
import os
import platform
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import psutil  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from result_files import write_results  # noqa: E402

from train_vlm.quickstart import TASKS, plan  # noqa: E402
from train_vlm.quickstart_report import TASK_NAMES  # noqa: E402
from train_vlm.quickstart_steps import run_steps  # noqa: E402

LONGEST_SECONDS = 1200  # for any start
MINUTES, RANKS = 1, 1  # half a minute of training, the least there is
# The step whose beginning is waited for, and the longest time from there to the kill.
MOMENTS = (("scenes", 4), ("scenes", 4), ("assemble", 8), ("shards", 8), ("train: captions", 12), ("train: captions", 20),
           ("train: align", 12), ("train: early", 12), ("train: early", 20), ("train: sft", 12), ("train: sft", 20),
           ("evaluate: vqav2", 8), ("evaluate: gqa", 8), ("evaluate: vizwiz", 8))  # fmt: skip


def start(out: Path, pictures: int, heldout: int, log: Path) -> subprocess.Popen:
    """The quickstart in a process group of its own; what it says goes to `log`."""
    command = [sys.executable, "-m", "train_vlm.quickstart", "--out", str(out), "--minutes", str(MINUTES), "--pictures", str(pictures),
               "--heldout", str(heldout), "--ranks", str(RANKS)]  # fmt: skip
    with open(log, "w") as file:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=file, start_new_session=True)
    atexit.register(_stop, process)
    return process


def _stop(process: subprocess.Popen) -> None:
    """Nothing goes on when this program is stopped."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)


def begun(log: Path) -> list[str]:
    """Names of the steps that this start has begun, the last one last; those it found finished are left out."""
    found = [re.fullmatch(r"\[\d+/\d+\] (.+)", line) for line in log.read_text(errors="replace").splitlines()]
    return [match[1] for match in found if match and ": finished before (" not in match[1]]


def kill_once(
    process: subprocess.Popen, log: Path, names: list[str], moment: tuple[str, float], *, alone: bool, generator
) -> tuple[dict, list]:
    """Wait for a moment and kill; what was seen, and the processes that have to end."""
    wanted, longest = moment
    began = time.monotonic()
    while process.poll() is None and not any(names.index(name) >= names.index(wanted) for name in begun(log)):
        if time.monotonic() - began > LONGEST_SECONDS:
            raise SystemExit(f"kill_quickstart: {wanted} has not begun after {LONGEST_SECONDS} s")
        time.sleep(0.02)
    until = time.monotonic() + generator.uniform(0, longest)
    while process.poll() is None and time.monotonic() < until:
        time.sleep(0.02)
    if process.poll() is not None:
        raise SystemExit(f"kill_quickstart: the run ended by itself, with {process.returncode}: {log.read_text()[-600:]}")
    below = psutil.Process(process.pid).children(recursive=True)
    if alone:
        process.kill()
    else:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait(LONGEST_SECONDS)
    seen = {"step": begun(log)[-1], "killed": "the quickstart alone" if alone else "all processes", "processes_below": len(below),
            "after_seconds": round(time.monotonic() - began, 1)}  # fmt: skip
    return seen, below


def contents(folder: Path) -> dict[str, str]:
    """Hashes of all files but summaries (they hold times) and hidden ones."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "summary.json" and not path.name.startswith(".")
    }


def _is_running(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


def answered_once(folder: Path) -> tuple[int, bool]:
    """Questions handed in by one evaluation, and whether each of them stands once in its answers and once in what is handed in."""
    rows = [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]
    handed = json.loads((folder / "submission.json").read_text())
    scored = json.loads((folder / "scores.json").read_text())["counts"]["scored"]
    keys = [next(str(row[key]) for key in ("question_id", "questionId", "image") if key in row) for row in rows]
    return scored, len(set(keys)) == len(keys) == len(handed) == scored


def verdict(whole: Path, killed: Path, names: list[str], code: int, left: list[psutil.Process]) -> dict:
    evaluations = {task + suffix: answered_once(killed / "eval" / (task + suffix)) for task in TASKS for suffix in ("", "-grey")}
    report = (killed / "report.md").read_text()
    stages = [killed / name for name in ("model-captions", "model-align", "model-early", "model")]
    equal = {name: contents(whole / name) == contents(killed / name) for name in ("scenes", "shards", "model-assembled")}
    return {
        "ended_with": code,
        "steps_finished": sum((killed / "receipts" / f"{name.replace(': ', '-')}.json").is_file() for name in names),
        "steps": len(names),
        **{f"{name}_equal_to_the_last_byte": same for name, same in equal.items()},
        "training_stages_finished": sum((stage / "training.json").is_file() for stage in stages),
        "training_stages_with_summary_and_report": sum(
            all((stage.with_name(f"{stage.name}.log") / file).is_file() for file in ("summary.json", "report.html")) for stage in stages
        ),
        "questions_answered": {name: count for name, (count, _) in evaluations.items()},
        "each_question_once": all(once for _, once in evaluations.values()),
        "report_complete": all(word in report for word in [*TASK_NAMES.values(), *names]),
        "processes_left_running": sum(map(_is_running, left)),
        "half_written_files_left": sum(1 for _ in killed.rglob(".*.partial")),
    }


def is_good(found: dict) -> bool:
    equal = all(value for name, value in found.items() if name.endswith("_to_the_last_byte"))
    stages = found["training_stages_finished"] == found["training_stages_with_summary_and_report"] == 4
    whole = found["ended_with"] == 0 and found["steps_finished"] == found["steps"] and not found["processes_left_running"]
    return equal and stages and whole and found["each_question_once"] and found["report_complete"]


def page(record: dict) -> str:
    out = ["# kill -9 at random moments of a quickstart", "", f"    {record['command']}", ""]
    out += [f"{record['machine']}; {', '.join(f'{name} {value}' for name, value in record['versions'].items())}. {record['run']}", ""]
    out += ["| what | found |", "|---|---:|"]
    for name, value in record["verdict"].items():
        shown = ", ".join(f"{key} {count}" for key, count in value.items()) if isinstance(value, dict) else value
        out.append(f"| {name.replace('_', ' ')} | {shown} |")
    out += ["", f"From the first start to the last end: {record['seconds']:.0f} s.", ""]
    out += ["| kill | in step | after s | killed | processes below it |", "|---:|---|---:|---|---:|"]
    out += [f"| {number} | {kill['step']} | {kill['after_seconds']} | {kill['killed']} | {kill['processes_below']} |"
            for number, kill in enumerate(record["kills"], 1)]  # fmt: skip
    return "\n".join(out) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=len(MOMENTS))
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--heldout", type=int, default=20, help="questions at least in each held-out set")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "kill_quickstart", help="where the runs are; emptied first")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "kill_quickstart")
    options = parser.parse_args()
    whole, killed, log = (options.work / name for name in ("whole", "killed", "killed.txt"))
    shutil.rmtree(options.work, ignore_errors=True)
    options.work.mkdir(parents=True)
    sizes = {"pictures": options.pictures, "heldout": options.heldout}
    names = [step.name for step in plan(killed, MINUTES, ranks=RANKS, **sizes)]
    # What does not depend on the clock, undisturbed: scenes, model, shards.
    run_steps(plan(whole, MINUTES, ranks=RANKS, **sizes)[:3], whole)
    began, generator, kills, left = time.monotonic(), random.Random(options.seed), [], []
    for number in range(options.kills):
        moment = MOMENTS[number * len(MOMENTS) // options.kills]
        process = start(killed, log=log, **sizes)
        seen, below = kill_once(process, log, names, moment, alone=number % 2 == 1, generator=generator)
        kills.append(seen)
        left += below
        print(f"{time.monotonic() - began:.0f} s: {seen}", flush=True)
    code = start(killed, log=log, **sizes).wait(LONGEST_SECONDS)
    seconds = time.monotonic() - began
    if code:
        raise SystemExit(f"kill_quickstart: the last start ended with {code}: {log.read_text()[-600:]}")
    given = [f"--{key} {getattr(options, key)}" for key in ("kills", "pictures", "heldout", "seed")]
    record = {
        "command": " ".join(["python benchmarks/kill_quickstart.py", *given]),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "python": platform.python_version()},
        "run": f"A quickstart of {options.pictures} pictures, at least {options.heldout} questions a held-out set, half a minute of "
        "training in four stages; its scores mean nothing.",
        "seconds": round(seconds, 1),
        "kills": kills,
        "verdict": verdict(whole, killed, names, code, left),
    }
    write_results(options.out, record, page(record))
    return 0 if is_good(record["verdict"]) else 1


if __name__ == "__main__":
    sys.exit(main())
