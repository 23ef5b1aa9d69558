"""Where two runs of one task differ: scores per type with their uncertainty, answers that flipped, and which setting changed.

A score that moved is only half an answer: a changed prompt, tiling, stop rule or normaliser moves it as well as a better model does. This
prints all of it; with --out it also writes a page with the pictures of flipped answers, and compare.json with every flipped id.

    python eval_vqa/compare.py RUN_A RUN_B [--data FOLDER] [--out FOLDER]
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval_vqa.bootstrap import paired_interval
from eval_vqa.json_files import write_json
from eval_vqa.measured_run import MeasuredRun, open_run
from eval_vqa.official_records import name_ids

__all__ = ["changed_settings", "compare", "main"]

# What decides an answer or a score, by the name a reader knows, and where it stands: (scores.json's "run" or the record, path of keys).
SETTINGS = {
    "prompt": ("run", ("prompt",)),
    "tiles": ("run", ("preprocessing", "tiles")),
    "visual tokens a tile": ("run", ("preprocessing", "visual_tokens_per_tile")),
    "preprocessing and tokenizer": ("run", ("preprocessing", "sha256")),
    "tiles used": ("run", ("counts", "tiles")),
    "tiles reduced": ("run", ("counts", "tiles_reduced")),
    "stop rule": ("run", ("stop_rule",)),
    "stop reasons": ("run", ("counts", "stop_reasons")),
    "decoding": ("run", ("decoding",)),
    "thinking": ("run", ("thinking",)),
    "normaliser": ("record", ("normaliser",)),
    "model": ("run", ("model_fingerprint",)),
    "dtype": ("run", ("dtype",)),
    "quantised weights": ("run", ("quantize",)),
    "grey pictures": ("run", ("grey",)),
    "questions": ("record", ("data", "questions", "sha256")),
    "annotations": ("record", ("data", "annotations", "sha256")),
    "pictures": ("run", ("images_sha256",)),
    "split": ("record", ("split",)),
    "versions": ("run", ("versions",)),
    "other versions on the way": ("run", ("earlier_starts",)),
}


def compare(a: MeasuredRun, b: MeasuredRun, *, resamples: int = 2000, seed: int = 0) -> dict:
    """The whole comparison: questions, per_type {grouping: [row]}, flipped (answers that differ), settings (see `changed_settings`).

    A row: type, count, a, b, difference, low, high (percent; the interval is that of the difference). Only questions that both scored
    count. Raises ValueError when the runs are of two tasks or share no question.
    """
    if a.task != b.task:
        raise ValueError(f"{a.name} is a run of {a.task} and {b.name} one of {b.task}; only runs of one task can be compared")
    shared = [key for key in a.percents if key in b.percents]
    if not shared:
        raise ValueError(f"{a.name} and {b.name} have no question in common")

    def row(name: str, ids: list) -> dict:
        differences = [b.percents[key] - a.percents[key] for key in ids]
        low, high = paired_interval(differences, [str(a.questions[key].image) for key in ids], resamples=resamples, seed=seed)
        scores = {"a": a.score(ids), "b": b.score(ids)}
        return {"type": name, "count": len(ids), **scores, "difference": scores["b"] - scores["a"], "low": low, "high": high}

    flipped = [
        {"id": key, "a": a.answers.get(key), "b": b.answers.get(key), "percent_a": a.percents[key], "percent_b": b.percents[key]}
        for key in shared
        if a.answers.get(key) != b.answers.get(key)
    ]
    return {
        "runs": {"a": str(a.folder), "b": str(b.folder)},
        "task": a.task,
        "questions": len(shared),
        "only_a": [key for key in a.percents if key not in b.percents],
        "only_b": [key for key in b.percents if key not in a.percents],
        "overall": row("all", shared),
        "per_type": {name: [row(kind, ids) for kind, ids in a.per_type(name, shared).items()] for name in a.groupings()},
        "flipped": flipped,
        "settings": changed_settings(a, b),
        "resamples": resamples,
        "seed": seed,
    }


def changed_settings(a: MeasuredRun, b: MeasuredRun) -> list[dict]:
    """[{"setting", "a", "b"}] of what differs; a None was not recorded (a run predicted elsewhere)."""
    changed = []
    for name, (where, keys) in SETTINGS.items():
        values = []
        for run in (a, b):
            value = run.settings if where == "run" else run.record
            for key in keys:
                value = value.get(key) if isinstance(value, dict) else None
            values.append(value)
        if values[0] != values[1]:
            changed.append({"setting": name, "a": values[0], "b": values[1]})
    return changed


def text(result: dict) -> str:
    """What is printed."""
    a, b = result["runs"].values()
    lines = [f"{result['task']}: {result['questions']} questions in both; A is {a}, B is {b}", ""]
    for key, other in (("only_a", "B"), ("only_b", "A")):
        if result[key]:
            lines.append(f"not in {other}, {name_ids(result[key])}")
    tables = {"": [result["overall"]], **result["per_type"]}
    width = max(len(row["type"]) for rows in tables.values() for row in rows) + 4
    lines.append(f"{'':<{width}}{'questions':>10}{'A':>9}{'B':>9}{'B - A':>9}   95 % interval")
    for name, rows in tables.items():
        lines += [f"{name}:"] if name else []
        for row in rows:
            sure = "*" if row["low"] > 0 or row["high"] < 0 else " "
            lines.append(
                f"{'  ' * bool(name) + row['type']:<{width}}{row['count']:>10}{row['a']:>9.2f}{row['b']:>9.2f}{row['difference']:>+9.2f}"
                f" {sure} {row['low']:+.2f} to {row['high']:+.2f}"
            )
    gained = sum(row["percent_b"] > row["percent_a"] for row in result["flipped"])
    lost = sum(row["percent_b"] < row["percent_a"] for row in result["flipped"])
    lines += ["", f"{len(result['flipped'])} answers differ: {gained} score more in B, {lost} less"]
    lines += ["", "What changed besides the answers:"] + [
        f"  {row['setting']}: {_short(row['a'])} -> {_short(row['b'])}" for row in result["settings"]
    ]
    lines += [] if result["settings"] else ["  nothing that was recorded"]
    return "\n".join(lines)


def _short(value) -> str:
    found = "not recorded" if value is None else str(value)
    return found if len(found) <= 90 else found[:87] + "..."


def main(argv: list[str] | None = None) -> int:
    """Exit code 0; 2 with one line for bad input."""
    parser = argparse.ArgumentParser(prog="compare", description="where two runs of one task differ", allow_abbrev=False)
    parser.add_argument("a", type=Path, metavar="RUN_A", help="folder of a scored run, or its scores.json")
    parser.add_argument("b", type=Path, metavar="RUN_B", help="the run to hold against it")
    parser.add_argument("--data", type=Path, help="data folder of both, when it is not where the runs say")
    parser.add_argument("--out", type=Path, help="folder for report.html, report.md and compare.json")
    parser.add_argument("--pictures", type=int, default=20, help="flipped answers shown each way (default %(default)s)")
    parser.add_argument("--resamples", type=int, default=2000, help="of the bootstrap (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default %(default)s)")
    args = parser.parse_args(argv)
    try:
        a, b = open_run(args.a, args.data), open_run(args.b, args.data)
        result = compare(a, b, resamples=args.resamples, seed=args.seed)
        print(text(result))
        if args.out:
            from eval_vqa.compare_page import write_page

            write_json(args.out / "compare.json", result, indent=1)
            print(f"\nwritten: {write_page(a, b, result, args.out, args.pictures)}")
    except (ValueError, OSError, ImportError) as error:
        print(f"compare: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
