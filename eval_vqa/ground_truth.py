"""What the right answer is and what type a question has, in one form for all tasks.

For reading only: the report and the comparison show it and group by it. Scores are the official functions' affair.
"""

from collections import Counter
from dataclasses import dataclass

from eval_vqa.json_files import read_json
from eval_vqa.official_files import OfficialFiles
from eval_vqa.official_records import field, index_records

__all__ = ["Truth", "read_truths"]


@dataclass(frozen=True)
class Truth:
    """answer: the most frequent one; answers: all distinct ones with how many people gave them; types: {name of a grouping: type}."""

    answer: str
    answers: tuple[tuple[str, int], ...]
    types: dict[str, str]


def read_truths(task: str, files: OfficialFiles) -> dict:
    """{question id: Truth} of an annotated split; {} of one without annotations. The folder's kinds.json is one more grouping."""
    if files.annotations is None:
        return {}
    truths = READERS[task](read_json(files.annotations))
    kinds = read_json(files.kinds) if files.kinds else {}
    if kinds:
        for key, truth in truths.items():
            truth.types["kind"] = str(kinds.get(str(key), "(none)"))
    return truths


def _truth(people: list[str], **types) -> Truth:
    counts = Counter(people)
    ordered = sorted(counts.items(), key=lambda pair: -pair[1])
    return Truth(ordered[0][0] if ordered else "", tuple(ordered), {name.replace("_", " "): str(value) for name, value in types.items()})


def _people(row: dict, owner: str) -> list[str]:
    return [str(entry["answer"] if isinstance(entry, dict) else entry) for entry in field(row, "answers", owner)]


def _vqav2(content: dict) -> dict:
    rows = index_records(field(content, "annotations", "the annotation file"), "question_id", "annotations")
    return {
        key: _truth(_people(row, f"{key!r}"), answer_type=row.get("answer_type"), question_type=row.get("question_type"))
        for key, row in rows.items()
    }


def _gqa(content: dict) -> dict:
    return {
        key: _truth([field(row, "answer", f"question {key!r}")], **{name: row["types"].get(name) for name in ("structural", "semantic")})
        for key, row in content.items()
        if row.get("isBalanced") and "answer" in row
    }


def _vizwiz(content: list) -> dict:
    rows = index_records(content, "image", "annotations")
    return {key: _truth(_people(row, f"{key!r}"), answer_type=row.get("answer_type")) for key, row in rows.items() if "answers" in row}


def _data(id_key: str):
    def read(content: dict) -> dict:
        rows = index_records(field(content, "data", "the annotation file"), id_key, "data")
        return {key: _truth(_people(row, f"{key!r}")) for key, row in rows.items()}

    return read


def _chartqa(content: list) -> dict:
    return {str(place): _truth([str(field(row, "label", f"entry {place}"))]) for place, row in enumerate(content)}


def _exact_match(content: list) -> dict:
    rows = index_records(content, "id", "questions")
    return {key: _truth(row["answer"] if isinstance(row["answer"], list) else [row["answer"]]) for key, row in rows.items()}


READERS = {
    "vqav2": _vqav2, "gqa": _gqa, "vizwiz": _vizwiz, "textvqa": _data("question_id"), "docvqa": _data("questionId"),
    "chartqa": _chartqa, "exact_match": _exact_match,
}  # fmt: skip
