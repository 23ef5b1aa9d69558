"""From official files and results to one record: scores, per question, per kind, and everything needed to know what was measured.

No torch here: a results file from anywhere can be scored with Python alone. Ids that do not correspond are never passed over in silence:
they are an error where they are one officially, and else listed in the record.
"""

import platform
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from eval_vqa import chartqa, docvqa, exact_match, gqa, textvqa, vizwiz, vqav2
from eval_vqa.json_files import file_sha256, read_json
from eval_vqa.official_files import OfficialFiles
from eval_vqa.official_records import field, index_records
from eval_vqa.postprocessing import POSTPROCESSING
from eval_vqa.predictions_file import RESULT_KEYS, read_results, result
from eval_vqa.soft_accuracy import mean

__all__ = ["ScoreOptions", "kind_table", "score_file", "score_results", "versions"]

OTHERS = {"textvqa": textvqa, "docvqa": docvqa, "chartqa": chartqa, "exact_match": exact_match}
NORMALISER_FILES = ("answer_normalization.py", "contractions.py", "postprocessing.py", "soft_accuracy.py")


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
    on_missing: str = "fail"  # ids that do not correspond: official rule, leave out, or count as answered with nothing


class Split:
    """The parsed files of a split, each read once."""

    def __init__(self, task: str, files: OfficialFiles):
        if files.annotations is None:
            raise ValueError(f"split {files.split} has no annotations in {files.questions.parent}: it can be predicted, not scored")
        self.task, self.files = task, files

    @cached_property
    def annotations(self):
        return read_json(self.files.annotations)

    @cached_property
    def questions(self):
        return self.annotations if self.files.questions == self.files.annotations else read_json(self.files.questions)

    def ids(self, consistency: bool) -> tuple[list, list]:
        """(all ids, those that need an answer)."""
        if self.task == "gqa":
            if not isinstance(self.questions, dict):
                raise ValueError(f"questions must be an object of questions by id, found {type(self.questions).__name__}")
            needed = [key for key, row in self.questions.items() if consistency or field(row, "isBalanced", f"question {key!r}")]
            return list(self.questions), needed
        if self.task == "chartqa":
            every = [str(place) for place in range(len(self.annotations))]
        else:
            key = {"vqav2": "annotations", "textvqa": "data", "docvqa": "data"}.get(self.task)
            records = field(self.annotations, key, "the annotation file") if key else self.annotations
            every = list(index_records(records, RESULT_KEYS[self.task][0], "annotations"))
        return every, every


def score_results(
    task: str, files: OfficialFiles, results: list, options: ScoreOptions, confidences: list | None = None
) -> tuple[dict, dict, dict]:
    """(scores, {id: percent}, {"missing": ids, "unknown": ids}) of official `results` on a split.

    missing and unknown: ids that should have an answer and have none, and answered ones that are not in the split; what becomes of them is
    options.on_missing. confidences: VizWiz's answerability results. Raises ValueError where the official program would fail.
    """
    split = Split(task, files)
    id_key = RESULT_KEYS[task][0]
    answered = index_records(results, id_key, "results")
    every, needed = split.ids(options.consistency)
    known = set(every)
    listed = {"missing": [key for key in needed if key not in answered], "unknown": [key for key in answered if key not in known]}
    if options.subset:
        listed["missing"] = []  # they were not asked
    if options.on_missing != "fail":
        results = [row for row in results if row[id_key] in known]
    if options.on_missing == "blank" and not options.subset:
        results = results + [result(task, key, "") for key in listed["missing"]]
    subset = [row[id_key] for row in results] if options.subset or options.on_missing == "skip" else None
    if task in OTHERS:
        subset = subset if subset is None else list(dict.fromkeys(subset))
        scores = OTHERS[task].evaluate(split.annotations, results, question_ids=subset)
        return {"accuracy": scores["accuracy"]}, scores["evalQA"], listed
    score = {"vqav2": _score_vqav2, "gqa": _score_gqa, "vizwiz": _score_vizwiz}[task]
    return *score(split, results, options, None if subset is None else dict.fromkeys(subset), confidences), listed


def score_file(task: str, files: OfficialFiles, predictions: Path, options: ScoreOptions) -> dict:
    """The record that scores.json holds, for a predictions.jsonl, a submission or any official results list."""
    results, rows = read_results(predictions, task)
    id_key, answer_key = RESULT_KEYS[task]
    index_records(results, id_key, str(predictions))
    confidences = [{id_key: row[id_key], "answerable": row.get("answerable", 0.5)} for row in rows if answer_key in row]
    confidences = confidences if any("answerable" in row for row in rows) else None
    scores, per_question, listed = score_results(task, files, results, options, confidences)
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
            "missing": len(listed["missing"]),
            "unknown": len(listed["unknown"]),
            "subset_only": options.subset or (options.on_missing == "skip" and bool(listed["missing"])),
        },
        "missing_ids": listed["missing"],
        "unknown_ids": listed["unknown"],
        "on_missing": options.on_missing,
        "prompt_sha256": run["prompt_sha256"] if run else None,  # None: predicted elsewhere, the prompt is not known
        "normaliser": normaliser(task, options),
        "predictions": {"file": predictions.name, "sha256": file_sha256(predictions)},
        "data": data,
        "versions": versions(),
        "run": run,
        "per_question": per_question,
    }


def normaliser(task: str, options: ScoreOptions) -> dict:
    """What answers were compared by: a name, and the SHA-256 over the source files that do it."""
    name = f"VQAv2 {options.version}" if task == "vqav2" else {"gqa": "exact equality", "vizwiz": "VizWiz"}.get(task, task)
    digest = sha256()
    for file in (*NORMALISER_FILES, f"{task}.py"):
        digest.update((Path(__file__).parent / file).read_bytes())
    return {"name": name, "postprocessing": POSTPROCESSING[task][1], "sha256": digest.hexdigest()}


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


def _score_vqav2(split: Split, results, options, subset, confidences):
    annotations = split.annotations
    if subset is not None:
        records = field(annotations, "annotations", "the annotation file")
        annotations = {**annotations, "annotations": [row for row in records if field(row, "question_id", "an annotation") in subset]}
    scores = vqav2.evaluate(split.questions, annotations, results, version=options.version)
    kept = {key: scores[key] for key in ("accuracy", "perAnswerType", "perQuestionType")}
    return {**kept, "version": options.version}, scores["evalQA"]


def _score_gqa(split: Split, results, options, subset, confidences):
    questions, files = split.questions, split.files
    if subset is not None:
        questions = {key: question for key, question in questions.items() if key in subset}
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
    answered = index_records(results, "questionId", "predictions")
    balanced = {key: question for key, question in questions.items() if question["isBalanced"]}
    return scores, {key: 100.0 if answered[key]["prediction"] == question["answer"] else 0.0 for key, question in balanced.items()}


def _score_vizwiz(split: Split, results, options, subset, confidences):
    scores = vizwiz.evaluate(split.annotations, results, images=None if subset is None else list(subset))
    kept = {key: scores[key] for key in ("accuracy", "perAnswerType")}
    labelled = split.annotations
    if options.answerability is not None:
        kept["answerability"] = vizwiz.evaluate_answerability(labelled, read_json(options.answerability))
    elif confidences is not None:
        given = {row["image"] for row in confidences}
        labelled = [row for row in labelled if "answerable" in row and (subset is None or row["image"] in subset) and row["image"] in given]
        if labelled:
            kept["answerability"] = vizwiz.evaluate_answerability(labelled, confidences)
    return kept, scores["evalQA"]
