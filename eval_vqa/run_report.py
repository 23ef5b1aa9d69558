"""One page about scored runs: scores beside published ones and baselines, per question type, confusions, and pictures to look at.

Twenty failures and twenty successes a task, each with the tiles the model saw: a score says how often, only pictures say why.

    python eval_vqa/run_report.py results/vqav2 results/gqa --grey results/vqav2-grey --majority results/vqav2-majority.json --out page
"""

import argparse
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval_vqa.json_files import read_json
from eval_vqa.measured_run import MeasuredRun, open_run
from eval_vqa.published import PUBLISHED
from eval_vqa.spread import spread
from eval_vqa.tile_view import shown_or_why_not

__all__ = ["Baselines", "build_report", "confusions", "main"]

RIGHT_PERCENT, WRONG_PERCENT = 90.0, 0.0  # from here on a success; up to here a failure
MOST_CONFUSIONS = 20
# Where the scores of a majority baseline stand, by grouping.
MAJORITY_TABLES = {"answer type": "perAnswerType", "question type": "perQuestionType", "structural": "accuracyPerStructuralType",
                   "semantic": "accuracyPerSemanticType"}  # fmt: skip


@dataclass
class Baselines:
    """What a run is held against: the same model on grey pictures, and the file that `baseline` wrote."""

    grey: MeasuredRun | None = None
    majority: dict = field(default_factory=dict)

    def majority_score(self, grouping: str | None = None, kind: str | None = None) -> float | None:
        """Overall, or of one type of a grouping; None where it is not known."""
        found = self.majority.get("majority", {})
        if grouping is None:
            return found.get("scores", {}).get("accuracy")
        table = found.get("kinds", {}) if grouping == "kind" else found.get("scores", {}).get(MAJORITY_TABLES.get(grouping, ""), {})
        entry = table.get(kind)
        return entry.get("accuracy") if isinstance(entry, dict) else entry


def build_report(runs: list[MeasuredRun], baselines: dict[str, Baselines], *, title: str, subtitle: str | None, pictures: int = 20):
    """A `vlm.report.Report` over runs of one or several tasks; baselines by task."""
    from vlm.report import Report

    page = Report(title, subtitle)
    page.figures(
        [(f"{run.task} {run.record['split']}", run.record["scores"]["accuracy"], _remark(baselines.get(run.task))) for run in runs], 2
    )
    for run in runs:
        _add_run(page, run, baselines.get(run.task) or Baselines(), pictures)
    return page


def confusions(run: MeasuredRun, most: int = MOST_CONFUSIONS) -> list[tuple[str, str, int]]:
    """(right answer, what was said, how often) of the most frequent wrong answers; the right one is the one most people gave."""
    wrong = Counter(
        (run.truths[key].answer, run.answers.get(key, ""))
        for key, percent in run.percents.items()
        if percent < 50 and key in run.truths and run.truths[key].answer != run.answers.get(key, "")
    )
    return [(right, said, count) for (right, said), count in wrong.most_common(most)]


def _remark(baselines: Baselines | None) -> str | None:
    if baselines is None:
        return None
    known = [("grey", baselines.grey.score() if baselines.grey else None), ("majority", baselines.majority_score())]
    return ", ".join(f"{name} {value:.1f}" for name, value in known if value is not None) or None


def _add_run(page, run: MeasuredRun, baselines: Baselines, pictures: int) -> None:
    from vlm.report import Marked

    scores, record = run.record["scores"], run.record
    page.heading(f"{run.task} {record['split']}")
    page.text(_sentence(run))
    rows = [[Marked("this run", "best"), scores["accuracy"], record["split"], "see the model's recipe"]]
    if baselines.grey:
        rows.append(["this model on grey pictures", baselines.grey.score(), baselines.grey.record["split"], "blind"])
    if baselines.majority:
        rows.append(["majority answer per question type", baselines.majority_score(), baselines.majority.get("split"), "blind"])
        rows.append(["best single answer per question (ceiling)", baselines.majority.get("ceiling"), baselines.majority.get("split"), "–"])
    rows += [[one.model, one.score, one.split, one.trained] for one in PUBLISHED.get(run.task, [])]
    page.table(["", "score", "split", "trained on"], [row for row in rows if row[1] is not None],
               "Published scores count beside this one only on the same split and the same training.", decimals=2)  # fmt: skip
    more = {name: scores[name] for name in ("binary", "open", "consistency", "validity", "plausibility", "grounding", "distribution")
            if scores.get(name) is not None} | scores.get("answerability", {})  # fmt: skip
    if more:
        page.table(["metric", "value"], [[name.replace("_", " "), value] for name, value in more.items()], decimals=2)
    for grouping in run.groupings():
        _add_types(page, run, baselines, grouping)
    if found := confusions(run):
        page.table(["people say", "the model says", "times"], [[right, said or "(nothing)", count] for right, said, count in found],
                   f"The {len(found)} most frequent confusions.")  # fmt: skip
    _add_circumstances(page, run)
    for name, chosen in _examples(run, pictures).items():
        page.heading(f"{run.task}: {name}")
        page.pictures([_picture(run, key) for key in chosen]) if chosen else page.text("None.")


def _sentence(run: MeasuredRun) -> str:
    counts = run.record["counts"]
    notes = [f"{counts['scored']:,} questions scored by {run.record['normaliser']['name']}"]
    for key, words in (("problems", "could not be asked"), ("missing", "without answer"), ("unknown", "answered but not in the split")):
        if counts.get(key):
            notes.append(f"{counts[key]:,} {words}")
    if counts.get("subset_only"):
        notes.append("only the answered questions were scored: not an official score")
    return "; ".join(notes) + "."


def _add_types(page, run: MeasuredRun, baselines: Baselines, grouping: str) -> None:
    headers = [grouping, "questions", "score"] + ["grey"] * bool(baselines.grey) + ["majority"] * bool(baselines.majority)
    rows = []
    for kind, ids in run.per_type(grouping).items():
        row = [kind, len(ids), run.score(ids)]
        row += [baselines.grey.score(ids)] if baselines.grey else []
        row += [baselines.majority_score(grouping, kind)] if baselines.majority else []
        rows.append(row)
    page.table(headers, rows, decimals=2)


def _add_circumstances(page, run: MeasuredRun) -> None:
    settings = run.settings
    counts = settings.get("counts", {})
    tiles = settings.get("preprocessing", {}).get("tiles", {})
    rows = [
        ("why answers ended", _listed(counts.get("stop_reasons"))), ("tiles an answer was given from", _listed(counts.get("tiles"))),
        ("questions with fewer tiles than wanted", counts.get("tiles_reduced")), ("prompt", settings.get("prompt")),
        ("thinking", "before each answer" if settings.get("thinking") else None),
        ("longest answer, tokens", settings.get("stop_rule", {}).get("max_new_tokens")), ("tiling", _listed(tiles)),
        ("prompt SHA-256", _cut(settings.get("prompt_sha256"))), ("model SHA-256", _cut(settings.get("model_fingerprint"))),
        ("preprocessing SHA-256", _cut(settings.get("preprocessing", {}).get("sha256"))),
        ("questions SHA-256", _cut(settings.get("questions_sha256"))), ("pictures SHA-256", _cut(settings.get("images_sha256"))),
        ("normaliser SHA-256", _cut(run.record["normaliser"]["sha256"])), ("versions", _listed(settings.get("versions"))),
        ("questions a second", counts.get("questions_per_second")),
    ]  # fmt: skip
    page.table(["circumstance", "value"], [[name, value] for name, value in rows if value not in (None, "")])


def _listed(values: dict | None) -> str:
    return ", ".join(f"{name}: {value}" for name, value in (values or {}).items())


def _cut(digest: str | None) -> str | None:
    return digest and digest[:16]


def _examples(run: MeasuredRun, count: int) -> dict[str, list]:
    grouping = "kind" if "kind" in run.groupings() else next(iter(run.groupings()), None)

    def kind(key):
        return run.truths[key].types.get(grouping) if key in run.truths else None

    asked = [key for key in run.percents if not run.rows.get(key, {}).get("problem")]
    failures = [key for key in asked if run.percents[key] <= WRONG_PERCENT]
    successes = [key for key in asked if run.percents[key] >= RIGHT_PERCENT]
    return {"failures": spread(failures, count, kind), "successes": spread(successes, count, kind)}


def _picture(run: MeasuredRun, key):
    from vlm.report import Marked

    row, percent = run.rows.get(key, {}), run.percents[key]
    said = run.answers.get(key) or "(nothing)"
    lines = [run.questions[key].text, Marked(f"{said} ({percent:.0f})", "good" if percent >= RIGHT_PERCENT else "bad")]
    if key in run.truths:
        lines.append(Marked("people: " + ", ".join(f"{answer} {count}" for answer, count in run.truths[key].answers[:4]), "quiet"))
    if row.get("stop_reason"):
        tiles = f"{row['tiles']} tile{'s' * (row['tiles'] > 1)}, " if row.get("tiles") else ""
        lines.append(Marked(f"{tiles}ended by {row['stop_reason']}", "quiet"))
    tiles = run.settings.get("preprocessing", {}).get("tiles", {})
    shown, fault = shown_or_why_not(run.questions[key].image, tiles, row.get("tiles"))
    return shown, lines + ([Marked(fault, "bad")] if fault else [])


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 with one line for bad input."""
    parser = argparse.ArgumentParser(prog="run_report", description="a page about scored runs", allow_abbrev=False)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN", help="folder of a scored run, one a task")
    parser.add_argument("--grey", type=Path, nargs="+", default=[], metavar="RUN", help="the same with --grey")
    parser.add_argument("--majority", type=Path, nargs="+", default=[], metavar="FILE", help="what `baseline --out` wrote")
    parser.add_argument("--data", type=Path, help="data folder, when it is not where the runs say (one task only)")
    parser.add_argument("--out", type=Path, required=True, help="folder for report.html and report.md")
    parser.add_argument("--title", default="Visual question answering", help="head of the page")
    parser.add_argument("--pictures", type=int, default=20, help="failures and successes shown (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        runs = [open_run(folder, args.data) for folder in args.runs]
        baselines: dict[str, Baselines] = {}
        for folder in args.grey:
            run = open_run(folder, args.data)
            baselines.setdefault(run.task, Baselines()).grey = run
        for file in args.majority:
            content = read_json(file)
            baselines.setdefault(str(content.get("task")), Baselines()).majority = content
        models = sorted({str(run.settings.get("model", "predicted elsewhere")) for run in runs})
        page = build_report(runs, baselines, title=args.title, subtitle=f"Model: {', '.join(models)}", pictures=args.pictures)
        print(f"written: {page.write(args.out)}")
    except (ValueError, OSError, ImportError) as error:
        print(f"run_report: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
