"""Every task that can be measured, on one screen: where its files are, what its questions are, and what the command lines need to know.

Prompts, postprocessing and result keys are tables of their own, because tests pin them; scores are in `eval_vqa.scoring`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from eval_vqa import chartqa, docvqa, exact_match, official_files, textvqa
from eval_vqa.json_files import read_json
from eval_vqa.official_files import OfficialFiles, Question
from eval_vqa.official_records import name_ids

__all__ = ["TASKS", "Task", "read_questions"]


@dataclass(frozen=True)
class Task:
    """locate: (folder, split or None) -> OfficialFiles; read: (parsed question file, image folder) -> questions in official order."""

    locate: Callable[[Path, str | None], OfficialFiles]
    read: Callable[[dict | list, Path], list[Question]]
    apart: bool = False  # answers are in another file than the questions
    baselines: bool = False  # `baseline` knows its files


TASKS = {
    "vqav2": Task(official_files.locate_vqav2, official_files.read_vqav2_questions, apart=True, baselines=True),
    "gqa": Task(official_files.locate_gqa, official_files.read_gqa_questions, baselines=True),
    "vizwiz": Task(official_files.locate_vizwiz, official_files.read_vizwiz_questions, baselines=True),
    "textvqa": Task(textvqa.locate, textvqa.read_questions),
    "docvqa": Task(docvqa.locate, docvqa.read_questions),
    "chartqa": Task(chartqa.locate, chartqa.read_questions),
    "exact_match": Task(exact_match.locate, exact_match.read_questions),
}


def read_questions(task: str, files: OfficialFiles) -> list[Question]:
    """The questions of a split in official order. Raises ValueError for a file without questions or with one that is no text."""
    rows = TASKS[task].read(read_json(files.questions), files.images)
    if not rows:
        raise ValueError(f"{files.questions} holds no questions")
    if silent := [row.id for row in rows if not isinstance(row.text, str)]:
        raise ValueError(f"{files.questions}: questions whose text is no string, {name_ids(silent)}")
    return rows
