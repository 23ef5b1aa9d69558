"""predictions.jsonl, which grows line by line and survives a kill, and what else can be scored.

A line is an official result ("question_id" and "answer", or GQA's and VizWiz's keys) with what one wants to know later: the text as
generated, why it stopped, tokens, seconds, and `problem` where an image or a request failed. A line with a problem is not an answer to
keep: the next start asks that question again.
"""

import json
from pathlib import Path

from eval_vqa.json_files import read_json
from eval_vqa.official_records import field

__all__ = ["RESULT_KEYS", "keep_answered", "read_results", "read_rows", "result"]

RESULT_KEYS = {"vqav2": ("question_id", "answer"), "gqa": ("questionId", "prediction"), "vizwiz": ("image", "answer")}


def result(task: str, question_id, answer: str) -> dict:
    """One official result."""
    id_key, answer_key = RESULT_KEYS[task]
    return {id_key: question_id, answer_key: answer}


def read_rows(path: Path, task: str) -> list[dict]:
    """The complete lines of a predictions.jsonl, the first of each question; a torn last line is left out.

    Raises FileNotFoundError, and ValueError for a line in the middle that is no JSON object with the task's id.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found")
    lines = path.read_bytes().split(b"\n")
    id_key = RESULT_KEYS[task][0]
    rows: dict = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError:
            if number == len(lines):  # no line feed after it: it was not written to its end
                break
            raise ValueError(f"{path}, line {number} is not valid JSON: delete that line and start again") from None
        rows.setdefault(field(row, id_key, f"{path}, line {number}"), row)
    return list(rows.values())


def keep_answered(path: Path, task: str) -> list[dict]:
    """Drops from the file a torn last line, repeated questions and lines with a problem; returns what stays ([] without a file).

    The file is replaced whole, and only when there is something to drop.
    """
    if not path.exists():
        return []
    rows = [row for row in read_rows(path, task) if not row.get("problem")]
    content = b"".join(line(row) for row in rows)
    if content != path.read_bytes():
        temporary = path.with_name(f".{path.name}.partial")
        temporary.write_bytes(content)
        temporary.replace(path)
    return rows


def line(row: dict) -> bytes:
    """`row` as it stands in the file."""
    return json.dumps(row, ensure_ascii=False).encode("utf-8") + b"\n"


def read_results(path: Path, task: str) -> tuple[list[dict], list[dict]]:
    """(official results, rows) of a predictions.jsonl, a submission.json or any official results list; rows is [] for the latter two.

    A question that was skipped (its line has no answer) is no result.
    """
    if path.suffix == ".jsonl":
        rows = read_rows(path, task)
        id_key, answer_key = RESULT_KEYS[task]
        return [result(task, row[id_key], row[answer_key]) for row in rows if answer_key in row], rows
    results = read_json(path)
    if not isinstance(results, list):
        raise ValueError(f"{path}: expected a JSON list of results (or a .jsonl file), found a {type(results).__name__}")
    return results, []
