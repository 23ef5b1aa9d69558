"""The page at the end of the quickstart: scores beside what a blind model and a majority vote get, curves, pictures, time and memory."""

import json
from pathlib import Path

from vlm.report import Marked, Report

__all__ = ["BARS", "TASK_NAMES", "collect_scores", "print_scores", "write_report"]

TASK_NAMES = {"vqav2": "VQAv2", "gqa": "GQA", "vizwiz": "VizWiz"}
# What a 15-minute run on two cores has to reach, in percent (VizWiz: of its ceiling).
BARS = {"vqav2": 70.0, "gqa": 65.0, "vizwiz": 75.0}
MARGIN, HIGH_BASELINE = 15.0, 80.0
STAGES = ("captions", "align", "early", "sft")


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def collect_scores(out: Path) -> dict[str, dict]:
    """{task: {"accuracy", "grey", "majority", "baseline", "ceiling", "of_ceiling", "kinds": {kind: {"count", "accuracy", "grey",
    "majority", "baseline"}}}}, all in percent. The baseline is the larger of the grey run and the majority answer per question type."""
    result = {}
    for task in TASK_NAMES:
        seen, grey = _read(out / "eval" / task / "scores.json"), _read(out / "eval" / f"{task}-grey" / "scores.json")
        majority = _read(out / "eval" / f"{task}-majority.json")
        kinds = {}
        for kind, entry in seen["kinds"].items():
            blind, common = grey["kinds"][kind]["accuracy"], majority["majority"]["kinds"][kind]["accuracy"]
            kinds[kind] = entry | {"grey": blind, "majority": common, "baseline": max(blind, common)}
        accuracy, blind = seen["scores"]["accuracy"], grey["scores"]["accuracy"]
        common = majority["majority"]["scores"]["accuracy"]
        ceiling = majority["ceiling"] or 100.0
        result[task] = {
            "accuracy": accuracy, "grey": blind, "majority": common, "baseline": max(blind, common), "ceiling": ceiling,
            "of_ceiling": 100.0 * accuracy / ceiling, "questions": seen["counts"]["scored"], "kinds": kinds,
        }  # fmt: skip
    return result


def _reached(task: str, entry: dict) -> bool:
    return (entry["of_ceiling"] if task == "vizwiz" else entry["accuracy"]) >= BARS[task]


def print_scores(out: Path) -> None:
    """The table a terminal shows at the end."""
    scores = collect_scores(out)
    print(f"\n{'':<22}{'score':>8}{'grey':>8}{'majority':>10}{'questions':>11}")
    for task, entry in scores.items():
        print(f"{TASK_NAMES[task]:<22}{entry['accuracy']:>8.1f}{entry['grey']:>8.1f}{entry['majority']:>10.1f}{entry['questions']:>11}")
    entry = scores["vizwiz"]
    print(f"VizWiz: {entry['of_ceiling']:.1f} % of its ceiling {entry['ceiling']:.1f} (the best constant answer per question)")
    print(f"\n{'VQAv2, by kind':<22}{'score':>8}{'grey':>8}{'majority':>10}{'questions':>11}")
    for kind, entry in scores["vqav2"]["kinds"].items():
        print(f"  {kind:<20}{entry['accuracy']:>8.1f}{entry['grey']:>8.1f}{entry['majority']:>10.1f}{entry['count']:>11}")


def _curves(out: Path) -> dict[str, list[tuple[float, float]]]:
    curves, offset = {}, 0
    for stage in STAGES:
        log = out / f"{'model' if stage == 'sft' else f'model-{stage}'}.log" / "log.jsonl"
        rows = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
        curves[stage] = [(offset + row["step"], row["loss"]) for row in rows]
        offset += rows[-1]["step"] if rows else 0
    return curves


def _samples(out: Path, count: int = 12) -> list[tuple]:
    """Pictures with question, answer and truth: the first question of each kind, then further ones, one a picture."""
    data = out / "scenes" / "heldout" / "vqav2"
    questions = {row["question_id"]: row for row in _read(next(data.glob("v2_OpenEnded_*_questions.json")))["questions"]}
    truths = {row["question_id"]: row for row in _read(next(data.glob("v2_mscoco_*_annotations.json")))["annotations"]}
    kinds = _read(data / "kinds.json")
    answers = {row["question_id"]: row["answer"] for row in _read(out / "eval" / "vqav2" / "submission.json")}
    percents = _read(out / "eval" / "vqav2" / "scores.json")["per_question"]
    chosen, pictures, seen_kinds = [], set(), set()
    for wants_new_kind in (True, False):
        for number, row in questions.items():
            kind = kinds[str(number)]
            if len(chosen) == count or row["image_id"] in pictures or (wants_new_kind and kind in seen_kinds):
                continue
            pictures.add(row["image_id"])
            seen_kinds.add(kind)
            truth = truths[number]["multiple_choice_answer"]
            right = float(percents[str(number)]) >= 50.0
            lines = [row["question"], Marked(answers[number], "good" if right else "bad"), f"truth: {truth} ({kind})"]
            chosen.append((data / "val2014" / f"COCO_val2014_{row['image_id']:012d}.jpg", lines))
    return chosen


def write_report(out: Path, receipts: dict[str, dict], *, minutes: float) -> Path:
    """Write report.html and report.md into the run's folder. Raises FileNotFoundError when a step's result is missing."""
    scores = collect_scores(out)
    total = sum(receipt["seconds"] for receipt in receipts.values())
    peak = max(receipt["peak_bytes"] for receipt in receipts.values())
    page = Report("A small Nemotron-H that sees", f"make quickstart MINUTES={minutes:g}")
    page.figures([(TASK_NAMES[task], entry["accuracy"], f"baseline {entry['baseline']:.1f}") for task, entry in scores.items()]
                 + [("minutes", total / 60), ("GB of memory", peak / 2**30)])  # fmt: skip
    page.heading("Scores").text(
        "Held-out scenes, official metrics. Grey: the same questions with every picture grey. Majority: the most frequent training answer "
        "of the question type. The baseline is the larger of the two. VizWiz's ceiling is what the best constant answer per question gets."
    )
    page.table(
        ["set", "questions", "score", "grey", "majority", "ceiling", "% of ceiling", "bar"],
        [
            [TASK_NAMES[task], entry["questions"], Marked(round(entry["accuracy"], 1), "good" if _reached(task, entry) else "bad"),
             entry["grey"], entry["majority"], entry["ceiling"], entry["of_ceiling"], BARS[task]]
            for task, entry in scores.items()
        ],
    )  # fmt: skip
    for task, entry in scores.items():
        page.heading(f"{TASK_NAMES[task]} by kind of question")
        rows = []
        for kind, values in entry["kinds"].items():
            fine = values["accuracy"] - values["baseline"] >= MARGIN or values["baseline"] > HIGH_BASELINE
            rows.append([kind, values["count"], Marked(round(values["accuracy"], 1), "good" if fine else "bad"), values["grey"],
                         values["majority"],
                         values["accuracy"] - values["baseline"]])  # fmt: skip
        page.table(["kind", "questions", "score", "grey", "majority", "over baseline"], rows)
    page.heading("Pictures").text("Held-out pictures, one question each: the model's answer and the truth.")
    page.pictures(_samples(out), scale=3)
    page.heading("Training").text(
        "Loss per supervised token: dense captions (everything trains), alignment (the projector), fine-tuning on questions."
    )
    if any((curves := _curves(out)).values()):
        page.curves({stage: points for stage, points in curves.items() if points}, "step", "loss", smooth=9, log_y=True)
    else:
        page.text("No stage was long enough for a line in its log.")
    page.heading("Time and memory")
    page.table(
        ["step", "seconds", "peak GB"], [[name, receipt["seconds"], receipt["peak_bytes"] / 2**30] for name, receipt in receipts.items()]
    )
    return page.write(out)
