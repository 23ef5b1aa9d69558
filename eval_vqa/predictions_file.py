"""predictions.jsonl, which grows line by line and survives a kill, and what else can be scored.

A line is an official result ("question_id" and "answer", or GQA's and VizWiz's keys) with what one wants to know later: the text as
generated, why it stopped, tokens, seconds, and `problem` where an image or a request failed. A line with a problem is not an answer to
keep: the next start asks that question again. Several processes may write one file: each line is appended under a lock, and what a killed
process left of a line is cut off first.
"""

import io
import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from eval_vqa.json_files import read_json
from eval_vqa.official_records import field

__all__ = ["RESULT_KEYS", "PredictionsFile", "keep_answered", "read_results", "read_rows", "result"]

RESULT_KEYS = {
    "vqav2": ("question_id", "answer"), "gqa": ("questionId", "prediction"), "vizwiz": ("image", "answer"),
    "textvqa": ("question_id", "answer"), "docvqa": ("questionId", "answer"), "chartqa": ("id", "answer"), "exact_match": ("id", "answer"),
}  # fmt: skip


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

    The file is replaced whole, and only when there is something to drop; no other process may be writing to it.
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


class PredictionsFile:
    """The growing file as one of several processes sees it: `rows` {id: row} of everybody, as of the last `refresh`.

    locked: makes the context in which lines are written, held by one process at a time.
    """

    def __init__(self, path: Path, task: str, locked: Callable[[], AbstractContextManager] = nullcontext):
        self.path, self.id_key, self.locked = path, RESULT_KEYS[task][0], locked
        self.rows: dict = {}
        self._read_bytes, self._inode = 0, None

    def append(self, *rows: dict) -> None:
        """Writes a line for each, in one transaction; a process killed afterwards loses nothing of them. What is cut off is only what was
        read through the same handle: on a file system of several machines, looking first and opening then sees two states."""
        with self.locked(), open(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644), "rb+", buffering=0) as file:
            torn = self._read_on(file)
            end, content = self._read_bytes, b"".join(map(line, rows))
            if torn and _is_json(torn):  # only its line feed is missing
                content = torn + b"\n" + content
            elif torn:
                file.truncate(end)
            file.seek(end)
            while content:
                content = content[file.write(content) :]
            self._read_on(file)

    def refresh(self) -> bytes:
        """Reads the lines that were added by anybody since the last time; returns what follows the last line feed.

        Raises ValueError for a line that is no JSON object with the task's id.
        """
        try:
            with open(self.path, "rb", buffering=0) as file:
                return self._read_on(file)
        except FileNotFoundError:
            return b""

    def _read_on(self, file: io.FileIO) -> bytes:
        found = os.fstat(file.fileno())
        if found.st_ino != self._inode or found.st_size < self._read_bytes:  # another file was put in its place
            self.rows, self._read_bytes, self._inode = {}, 0, found.st_ino
        file.seek(self._read_bytes)
        content = file.readall()
        whole = content[: content.rfind(b"\n") + 1]
        for text in whole.split(b"\n"):
            if text.strip():
                if not _is_json(text):
                    raise ValueError(f"{self.path} holds a line that is not valid JSON: {text[:60]!r}; delete it and start again")
                row = json.loads(text)
                self.rows.setdefault(field(row, self.id_key, str(self.path)), row)
        self._read_bytes += len(whole)
        return content[len(whole) :]


def _is_json(text: bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


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
