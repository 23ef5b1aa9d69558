"""A finished run as the report and the comparison read it: its record, its answers, its questions and what would have been right.

A run is the folder that `run` or `score` left behind. Where its data lay is in run.json; another place may be given. No torch here.
"""

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from eval_vqa.ground_truth import Truth, read_truths
from eval_vqa.json_files import read_json
from eval_vqa.official_files import OfficialFiles, Question
from eval_vqa.official_records import field
from eval_vqa.predictions_file import RESULT_KEYS, read_results
from eval_vqa.soft_accuracy import mean
from eval_vqa.tasks import TASKS, read_questions

__all__ = ["MeasuredRun", "open_run"]


@dataclass
class MeasuredRun:
    """All dicts go by question id. record: scores.json; percents: score of each question; answers: what was handed in; rows: lines of
    predictions.jsonl, {} for a run predicted elsewhere; truths: {} where the split has no answers."""

    name: str
    folder: Path
    record: dict
    percents: dict
    answers: dict[object, str]
    rows: dict[object, dict]
    questions: dict[object, Question]
    truths: dict[object, Truth]

    @property
    def task(self) -> str:
        return self.record["task"]

    @property
    def settings(self) -> dict:
        """run.json as it was when the run was scored; {} for a run predicted elsewhere."""
        return self.record.get("run") or {}

    def groupings(self) -> list[str]:
        """Names of the types that questions of this task have, e.g. "answer type"."""
        return list(dict.fromkeys(name for truth in self.truths.values() for name in truth.types))

    def per_type(self, grouping: str, ids: Iterable | None = None) -> dict[str, list]:
        """{type: ids of its scored questions}, the most frequent type first."""
        groups = defaultdict(list)
        for key in self.percents if ids is None else ids:
            if key in self.truths:
                groups[self.truths[key].types.get(grouping, "(none)")].append(key)
        return dict(sorted(groups.items(), key=lambda pair: (-len(pair[1]), pair[0])))

    def score(self, ids: Iterable | None = None) -> float | None:
        """Mean percent over questions; None without any."""
        chosen = [self.percents[key] for key in (self.percents if ids is None else ids) if key in self.percents]
        return mean(chosen) if chosen else None


def open_run(folder: Path, data: Path | None = None, split: str | None = None) -> MeasuredRun:
    """The run in `folder` (or the scores.json given by name). data: its data folder, when it no longer is where run.json says.

    Raises FileNotFoundError / ValueError for what is no scored run or has lost its data.
    """
    folder = Path(folder)
    path = folder if folder.is_file() else folder / "scores.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found; score the run first: python eval_vqa/TASK.py score --predictions ... --out {path}")
    record, folder = read_json(path), path.parent
    task = field(record, "task", str(path))
    if task not in TASKS:
        raise ValueError(f"{path}: the task {task!r} is unknown; expected one of {', '.join(TASKS)}")
    files = _files(task, record, data, split or record.get("split"), path)
    results, rows = read_results(folder / field(field(record, "predictions", str(path)), "file", "predictions"), task)
    id_key, answer_key = RESULT_KEYS[task]
    questions = {row.id: row for row in read_questions(task, files)}
    by_text = {str(key): key for key in questions}  # JSON turned the ids into strings
    percents = {by_text[key]: percent for key, percent in field(record, "per_question", str(path)).items() if key in by_text}
    if not percents:
        raise ValueError(f"{path}: none of its questions is in {files.questions}; give the run's data with --data")
    return MeasuredRun(
        folder.name,
        folder,
        record,
        percents,
        {row[id_key]: row[answer_key] for row in results},
        {row[id_key]: row for row in rows},
        questions,
        read_truths(task, files),
    )


def _files(task: str, record: dict, data: Path | None, split: str | None, path: Path) -> OfficialFiles:
    if data is not None:
        return TASKS[task].locate(data, split)
    remembered = (record.get("run") or {}).get("files")
    if not remembered:
        raise ValueError(f"{path} does not say where its data is; give it with --data FOLDER")
    return OfficialFiles(split, **{name: Path(place) for name, place in remembered.items()})
