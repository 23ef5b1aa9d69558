"""From official files and results to one record: scores, per question, per kind, and everything needed to know what was measured.

No torch here: a results file from anywhere can be scored with Python alone.
"""

import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from eval_vqa import gqa, vizwiz, vqav2
from eval_vqa.json_files import file_sha256, read_json
from eval_vqa.official_files import OfficialFiles
from eval_vqa.official_records import field, index_records
from eval_vqa.predictions_file import RESULT_KEYS, read_results
from eval_vqa.soft_accuracy import mean

__all__ = ["ScoreOptions", "kind_table", "score_file", "score_results", "table", "versions"]

TABLES = {"perAnswerType": "Per answer type", "perQuestionType": "Per question type", "answerability": "Answerability"}


@dataclass(frozen=True)
class ScoreOptions:
    """What may be chosen in scoring; each field is a command line option."""

    version: str = "2021"  # VQAv2's official program: 2021 or 2017
    consistency: bool = False  # GQA: needs answers to all questions, balanced or not
    grounding: bool = False  # GQA: needs attentions
    attentions: Path | None = None  # GQA: file of the official form
    map_size: int = 7  # GQA: cells of an attention map in each direction
    answerability: Path | None = None  # VizWiz: results file of the answerability task
    subset: bool = False  # score the answered questions only


def score_results(task: str, files: OfficialFiles, results: list, options: ScoreOptions) -> tuple[dict, dict]:
    """(scores, {id: percent}) of official `results` on a split. Raises ValueError where the official program would fail."""
    if files.annotations is None:
        raise ValueError(f"split {files.split} has no annotations in {files.questions.parent}: it can be predicted, not scored")
    return {"vqav2": _score_vqav2, "gqa": _score_gqa, "vizwiz": _score_vizwiz}[task](files, results, options)


def score_file(task: str, files: OfficialFiles, predictions: Path, options: ScoreOptions) -> dict:
    """The record that scores.json holds, for a predictions.jsonl, a submission or any official results list."""
    results, rows = read_results(predictions, task)
    id_key, answer_key = RESULT_KEYS[task]
    index_records(results, id_key, str(predictions))
    scores, per_question = score_results(task, files, results, options)
    run_path = predictions.parent / "run.json"
    run = read_json(run_path) if run_path.is_file() else None
    data = {
        name: {"file": path.name, "sha256": file_sha256(path)}
        for name in ("questions", "annotations", "choices", "scene_graphs", "kinds")
        if (path := getattr(files, name)) is not None
    }
    return {
        "task": task,
        "split": files.split,
        "scores": scores,
        "kinds": kind_table(files, per_question),
        "counts": {
            "scored": len(per_question),
            "empty_answers": sum(record.get(answer_key) == "" for record in results),
            "problems": sum(bool(row.get("problem")) for row in rows),
            "subset_only": options.subset,
        },
        "prompt_sha256": run["prompt_sha256"] if run else None,  # None: predicted elsewhere, the prompt is not known
        "predictions": {"file": predictions.name, "sha256": file_sha256(predictions)},
        "data": data,
        "versions": versions(),
        "run": run,
        "per_question": per_question,
    }


def versions() -> dict:
    """Versions of Python and of the packages that decide an answer, as far as they are installed; nothing is imported for it."""
    found = {"python": platform.python_version()}
    for name in ("nemotron-h-vision", "torch", "transformers", "pillow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def kind_table(files: OfficialFiles, per_question: dict) -> dict:
    """{kind: {"accuracy": percent, "count": n}} by the folder's kinds.json; {} without one. Ids without kind are "(none)"."""
    if files.kinds is None:
        return {}
    kinds = read_json(files.kinds)
    if not isinstance(kinds, dict):
        raise ValueError(f"{files.kinds}: expected an object of kinds by question id, found a {type(kinds).__name__}")
    groups: dict[str, list[float]] = {}
    for question_id, percent in per_question.items():
        groups.setdefault(str(kinds.get(str(question_id), "(none)")), []).append(percent)
    return {kind: {"accuracy": round(mean(values), 2), "count": len(values)} for kind, values in sorted(groups.items())}


def table(record: dict) -> str:
    """What `score` prints: GQA's official lines, a table for the others; kinds below."""
    scores = record["scores"]
    lines = [f"{record['task']} {record['split']}: {record['counts']['scored']} questions scored"]
    if record["counts"]["subset_only"]:
        lines.append("only the answered questions were scored: not an official score")
    if record["task"] == "gqa":
        lines += ["", gqa.report(scores)]
    else:
        width = max((len(str(name)) for key in scores if isinstance(scores[key], dict) for name in scores[key]), default=0) + 4
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


def _score_vqav2(files, results, options):
    questions, annotations = read_json(files.questions), read_json(files.annotations)
    if options.subset:
        answered = index_records(results, "question_id", "results")
        records = field(annotations, "annotations", "the annotation file")
        annotations = {**annotations, "annotations": [row for row in records if field(row, "question_id", "an annotation") in answered]}
    scores = vqav2.evaluate(questions, annotations, results, version=options.version)
    kept = {key: scores[key] for key in ("accuracy", "perAnswerType", "perQuestionType")}
    return {**kept, "version": options.version}, scores["evalQA"]


def _score_gqa(files, results, options):
    questions = read_json(files.questions)
    answered = index_records(results, "questionId", "predictions")
    if options.subset:
        questions = {key: question for key, question in questions.items() if key in answered}
    attentions = scene_graphs = None
    if options.grounding:
        if options.attentions is None or files.scene_graphs is None:
            raise ValueError("--grounding needs --attentions FILE and the tier's sceneGraphs.json in the data folder")
        attentions, scene_graphs = read_json(options.attentions), read_json(files.scene_graphs)
    scores = gqa.evaluate(
        questions,
        results,
        choices=read_json(files.choices) if files.choices else None,
        scene_graphs=scene_graphs,
        attentions=attentions,
        consistency=options.consistency,
        grounding=options.grounding,
        map_size=options.map_size,
    )
    balanced = {key: question for key, question in questions.items() if question["isBalanced"]}
    return scores, {key: 100.0 if answered[key]["prediction"] == question["answer"] else 0.0 for key, question in balanced.items()}


def _score_vizwiz(files, results, options):
    annotations = read_json(files.annotations)
    images = list(index_records(results, "image", "results")) if options.subset else None
    scores = vizwiz.evaluate(annotations, results, images=images)
    kept = {key: scores[key] for key in ("accuracy", "perAnswerType")}
    if options.answerability is not None:
        kept["answerability"] = vizwiz.evaluate_answerability(annotations, read_json(options.answerability))
    return kept, scores["evalQA"]
