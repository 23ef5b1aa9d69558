"""The comparison of two runs as a page: the same tables as `eval_vqa.compare` prints, and the pictures of answers that flipped."""

from pathlib import Path

from eval_vqa.measured_run import MeasuredRun
from eval_vqa.spread import spread
from eval_vqa.tile_view import shown_or_why_not
from vlm.report import Marked, Report

__all__ = ["write_page"]

MOST_TYPES = 30


def write_page(a: MeasuredRun, b: MeasuredRun, result: dict, out: Path, pictures: int) -> Path:
    """Writes OUT/report.html and report.md of what `compare` returned; returns the path of the former."""
    names = a.folder.name, b.folder.name
    if names[0] == names[1]:
        names = f"{a.folder.parent.name}/{names[0]}", f"{b.folder.parent.name}/{names[1]}"
    page = Report(f"{a.task}: {names[0]} and {names[1]}", f"A is {a.folder}, B is {b.folder}; {result['questions']:,} questions in both")
    overall = result["overall"]
    interval = f"95 % interval {overall['low']:+.2f} to {overall['high']:+.2f}"
    figures = [("A", overall["a"]), ("B", overall["b"]), ("B - A", _difference(overall), interval)]
    page.figures([*figures, ("answers that differ", len(result["flipped"]))], decimals=2)
    page.heading("What changed besides the answers")
    if result["settings"]:
        page.table(["setting", "A", "B"], [[row["setting"], _shown(row["a"]), _shown(row["b"])] for row in result["settings"]])
    else:
        page.text("Nothing that was recorded: prompt, tiles, stop rule, normaliser, model, data and versions are the same.")
    for name, rows in result["per_type"].items():
        page.heading(f"Per {name}")
        rest = f"; {len(rows) - MOST_TYPES} rarer types are in compare.json" if len(rows) > MOST_TYPES else ""
        page.table(
            [name, "questions", "A", "B", "B - A", "95 % interval"],
            [
                [row["type"], row["count"], row["a"], row["b"], _difference(row), f"{row['low']:+.2f} to {row['high']:+.2f}"]
                for row in rows[:MOST_TYPES]
            ],
            f"Paired bootstrap over images, {result['resamples']} resamples; a mark where the interval leaves out 0{rest}.",
            decimals=2,
        )
    first_grouping = next(iter(a.groupings()), None)
    for title, sign in (("Gained: B scores more", 1), ("Lost: B scores less", -1)):
        flips = [row for row in result["flipped"] if sign * (row["percent_b"] - row["percent_a"]) > 0]
        chosen = spread(flips, pictures, lambda row: a.truths[row["id"]].types.get(first_grouping) if row["id"] in a.truths else None)
        page.heading(title)
        page.text(f"{len(flips)} answers, {len(chosen)} of them shown." if flips else "None.")
        page.pictures([_picture(a, b, row) for row in chosen])
    return page.write(out)


def _difference(row: dict):
    sure = row["low"] > 0 or row["high"] < 0
    return Marked(row["difference"], "good" if row["difference"] > 0 else "bad") if sure else row["difference"]


def _picture(a: MeasuredRun, b: MeasuredRun, row: dict):
    question = a.questions[row["id"]]
    used = a.rows.get(row["id"], {}).get("tiles")
    lines = [question.text]
    for name, answer, percent in (("A", row["a"], row["percent_a"]), ("B", row["b"], row["percent_b"])):
        mark = "good" if percent >= 50 else "bad"
        lines.append(Marked(f"{name}: {answer if answer else '(nothing)'} ({percent:.0f})", mark))
    if row["id"] in a.truths:
        lines.append(Marked(f"people: {a.truths[row['id']].answer}", "quiet"))
    shown, fault = shown_or_why_not(question.image, a.settings.get("preprocessing", {}).get("tiles", {}), used)
    return shown, lines + ([Marked(fault, "bad")] if fault else [])


def _shown(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_shown(entry)}" for key, entry in value.items())
    if isinstance(value, str) and len(value) == 64 and all(letter in "0123456789abcdef" for letter in value):
        return value[:12] + "..."
    return "not recorded" if value is None else str(value)
