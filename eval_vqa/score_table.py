"""What `score` prints: GQA's official lines, a table for the others, kinds below, and whatever is not as it should be first."""

from eval_vqa import gqa
from eval_vqa.official_records import name_ids

__all__ = ["table"]

TABLES = {"perAnswerType": "Per answer type", "perQuestionType": "Per question type", "answerability": "Answerability"}


def table(record: dict) -> str:
    """The text for a record of `eval_vqa.scoring.score_file`."""
    scores = record["scores"]
    lines = [f"{record['task']} {record['split']}: {record['counts']['scored']} questions scored"]
    if record["counts"]["subset_only"]:
        lines.append("only the answered questions were scored: not an official score")
    if record.get("missing_ids"):
        treated = "left out" if record["on_missing"] == "skip" else "counted as answered with nothing"
        lines.append(f"questions without answer, {treated}, {name_ids(record['missing_ids'])}")
    if record.get("unknown_ids"):
        lines.append(f"answers to questions that are not in this split, ignored, {name_ids(record['unknown_ids'])}")
    if record["task"] == "gqa":
        lines += ["", gqa.report(scores)]
    else:
        width = max((len(str(name)) for key in scores if isinstance(scores[key], dict) for name in scores[key]), default=6) + 4
        lines.append(f"{'Accuracy':<{width}}{scores['accuracy']:7.2f}%")
        for key, title in TABLES.items():
            if key in scores:
                lines += ["", f"{title}:"]
                lines += [f"  {name!s:<{width - 2}}{scores[key][name]:7.2f}%" for name in sorted(scores[key], key=str)]
    if record["kinds"]:
        width = max(map(len, record["kinds"])) + 2
        lines += ["", "Per kind:"]
        lines += [f"  {kind:<{width}}{entry['accuracy']:7.2f}% ({entry['count']} questions)" for kind, entry in record["kinds"].items()]
    return "\n".join(lines)
