"""kill -9 at random moments of a prediction run: is it complete in the end, with each question once and the same answers?

A run is started again and again, each time with another number of processes, and killed: more often than not somewhere in its start-up or
among its first answers, for the model gives a hundred or two a second; else a random time after a random number of new ones. Mostly all
its processes at once are killed, one time in four only one of them. Then it is left to finish, and its files are compared with those of a
run that nobody disturbed.

    python benchmarks/kill_predict.py --model runs/quickstart/model --data runs/quickstart/scenes/heldout/vqav2 --task vqav2
"""

import argparse
import json
import os
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from eval_vqa.json_files import read_json, write_json  # noqa: E402
from eval_vqa.predictions_file import RESULT_KEYS  # noqa: E402
from eval_vqa.scoring import versions  # noqa: E402

MOST_RANKS = 3
LONGEST_SECONDS = 3600
LONGEST_DELAY_SECONDS = 0.1  # between seeing an answer and the kill: longer than a line takes, shorter than a batch


def command(args, out: Path, ranks: int) -> list[str]:
    program = str(ROOT / "eval_vqa" / f"{args.task}.py")
    limit = ["--limit", str(args.limit)] if args.limit else []
    return [sys.executable, program, "predict", "--model", str(args.model), "--data", str(args.data), "--out", str(out),
            "--ranks", str(ranks), "--batch", str(args.batch), *limit]  # fmt: skip


def start(args, out: Path, ranks: int) -> subprocess.Popen:
    """A run in a process group of its own, so that all of it can be killed at once."""
    return subprocess.Popen(command(args, out, ranks), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def children(pid: int) -> list[int]:
    """The ranks of a run."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def content(out: Path) -> bytes:
    path = out / "predictions.jsonl"
    return path.read_bytes() if path.exists() else b""


def undisturbed(args, out: Path) -> dict:
    """Seconds to the first answer and to the end."""
    began, first = time.monotonic(), None
    process = start(args, out, 2)
    while process.poll() is None:
        if first is None and content(out):
            first = time.monotonic() - began
        time.sleep(0.02)
    if process.returncode != 0:
        raise SystemExit(f"kill_predict: the undisturbed run ended with exit code {process.returncode}; try: {command(args, out, 2)}")
    seconds = round(time.monotonic() - began, 2)
    return {"first_answer_seconds": round(first, 2), "seconds": seconds, "questions": len(read_json(out / "submission.json"))}


def kill_again_and_again(args, out: Path, reference: dict, generator: random.Random) -> list[dict]:
    """One entry a kill: after how long, which processes, and what was in the file."""
    # Most new answers that one start is waited for, so that the run is not complete too early: those of a second come to the file together.
    per_kill = 0.6 * reference["questions"] / args.kills
    quickest_start = reference["first_answer_seconds"]
    kills = []
    while len(kills) < args.kills:
        ranks, in_start = generator.randint(1, MOST_RANKS), generator.random() < 0.6
        before, began = content(out).count(b"\n"), time.monotonic()
        target = before + generator.uniform(1, per_kill)
        process = start(args, out, ranks)
        if in_start:
            time.sleep(generator.uniform(0, quickest_start))
        else:
            first = None
            while process.poll() is None and content(out).count(b"\n") < target:
                if first is None and content(out).count(b"\n") > before:
                    first = time.monotonic() - began
                time.sleep(0.005)
            quickest_start = min(quickest_start, first or quickest_start)
            time.sleep(generator.uniform(0, LONGEST_DELAY_SECONDS))
        if process.poll() is not None:
            raise SystemExit(f"kill_predict: the run was complete after {len(kills)} kills; use more questions or fewer kills")
        alone = generator.random() < 0.25 and children(process.pid)
        if alone:
            os.kill(generator.choice(alone), signal.SIGKILL)  # its neighbours are stopped by the one that started them
        else:
            os.killpg(process.pid, signal.SIGKILL)
        after = time.monotonic() - began
        process.wait(LONGEST_SECONDS)
        now = content(out)
        kills.append({
            "after_seconds": round(after, 2), "ranks": ranks, "killed": "one" if alone else "all",
            "moment": "start" if in_start else "answering", "answers_now": now.count(b"\n"),
            "torn_line": bool(now) and not now.endswith(b"\n"),
        })  # fmt: skip
        print(kills[-1], flush=True)
    return kills


def verdict(args, disturbed: Path, reference: Path) -> dict:
    """What the two folders hold."""
    id_key, answer_key = RESULT_KEYS[args.task]
    rows = [json.loads(line) for line in content(disturbed).splitlines()]
    ids = [row[id_key] for row in rows]
    wanted = {row[id_key]: row[answer_key] for row in read_json(reference / "submission.json")}
    submission = read_json(disturbed / "submission.json")
    return {
        "questions": len(wanted),
        "lines": len(ids),
        "missing": len(set(wanted) - set(ids)),
        "twice": len(ids) - len(set(ids)),
        "unknown": len(set(ids) - set(wanted)),
        "submission_in_order": [row[id_key] for row in submission] == list(wanted),
        "answers_that_differ": sum(wanted[row[id_key]] != row[answer_key] for row in submission),
        "problems": len(read_json(disturbed / "run.json")["problems"]),
    }


def page(record: dict) -> str:
    lines = ["# kill -9 at random moments of a prediction run", "", f"`{record['command']}`", ""]
    lines += [f"{record['machine']}; {', '.join(f'{name} {value}' for name, value in record['versions'].items())}", ""]
    lines += [
        "| what | found |",
        "|---|---:|",
        *(f"| {name.replace('_', ' ')} | {value} |" for name, value in record["verdict"].items()),
        "",
    ]
    lines += [f"Undisturbed: first answer after {record['undisturbed']['first_answer_seconds']} s, done after "
              f"{record['undisturbed']['seconds']} s.", ""]  # fmt: skip
    lines += ["| kill | after s | in its | processes | killed | answers in the file | torn line |", "|---:|---:|---|---:|---|---:|---|"]
    for number, kill in enumerate(record["kills"], start=1):
        lines.append(f"| {number} | {kill['after_seconds']} | {kill['moment']} | {kill['ranks']} | {kill['killed']} | "
                     f"{kill['answers_now']} | {'yes' if kill['torn_line'] else 'no'} |")  # fmt: skip
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=Path("runs/quickstart/model"))
    parser.add_argument("--data", type=Path, default=Path("runs/quickstart/scenes/heldout/vqav2"))
    parser.add_argument("--task", default="vqav2")
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--batch", type=int, default=16, help="small, so that little is in the engine at each kill")
    parser.add_argument("--limit", type=int, help="only the first so many questions")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results", help="folder for kill_predict.md and .json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        reference, disturbed = Path(folder) / "reference", Path(folder) / "disturbed"
        timing = undisturbed(args, reference)
        print(timing, flush=True)
        kills = kill_again_and_again(args, disturbed, timing, random.Random(args.seed))
        last = start(args, disturbed, 2)
        if last.wait(LONGEST_SECONDS) != 0:
            raise SystemExit(f"kill_predict: the last start ended with exit code {last.returncode}")
        record = {
            "command": f"python benchmarks/kill_predict.py --task {args.task} --kills {args.kills} --batch {args.batch} --seed {args.seed}"
            + (f" --limit {args.limit}" if args.limit else ""),
            "machine": f"{os.cpu_count()} cores, {platform.machine()}, {platform.system()}",
            "versions": versions(),
            "undisturbed": timing,
            "kills": kills,
            "verdict": verdict(args, disturbed, reference),
        }
    write_json(args.out / "kill_predict.json", record, indent=1)
    (args.out / "kill_predict.md").write_text(page(record))
    print(page(record))
    found = record["verdict"]
    whole = not (found["missing"] or found["twice"] or found["unknown"]) and found["submission_in_order"]
    return 0 if whole else 1


if __name__ == "__main__":
    sys.exit(main())
