"""GQA: the official scores and report, and the command that predicts and scores.

Answers compare by exact, case-sensitive equality; nothing is normalised. Only balanced questions are scored. The unbalanced ones serve
consistency: whoever answers a question right should answer right what follows from it.

    python eval_vqa/gqa.py predict|score|run|baseline --help
"""

import sys
from collections import defaultdict
from pathlib import Path

if __package__ in (None, ""):  # started as a script: its own folder is first on the path, the project's is not
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from eval_vqa.gqa_grounding import grounding_score
from eval_vqa.official_records import field, index_records, name_ids
from eval_vqa.soft_accuracy import mean, plain_sum

__all__ = ["evaluate", "report"]

NOT_STEPS = ("exist", "query: name", "choose name")  # semantic entries that only ask, and add no reasoning
COMMON_ATTRIBUTES = ("color", "material", "shape")  # the answers of "what do both have in common?", whatever the choices file says
METRICS = ("binary", "open", "accuracy", "consistency", "validity", "plausibility", "grounding", "distribution")
BLOCKS = {
    "accuracyPerStructuralType": "Accuracy / structural type",
    "accuracyPerSemanticType": "Accuracy / semantic type",
    "accuracyPerSteps": "Accuracy / steps number",
    "accuracyPerLength": "Accuracy / words number",
}


def evaluate(
    questions: dict,
    predictions: list,
    *,
    choices: dict | None = None,
    scene_graphs: dict | None = None,
    attentions: list | None = None,
    consistency: bool = False,
    grounding: bool = False,
    map_size: int = 7,
) -> dict:
    """The official GQA scores from the parsed official files, none of which is changed.

    questions: {id: question}. predictions: [{"questionId", "prediction"}]; of several for one id the last counts, unknown ids do no
    harm; every balanced question needs one, with `consistency` every question. choices: {id: {"valid", "plausible"}}. scene_graphs
    {imageId: ...} and attentions [{"questionId", "attention"}] are for `grounding`; attention is map_size x map_size or boxes (see
    gqa_grounding). Returns accuracy, binary, open, consistency, validity, plausibility, grounding (percent, not rounded), distribution
    (chi-square / 100, lower is better), each None when it was not asked for or has no file and 0.0 when no question qualified, and
    accuracyPerStructuralType, accuracyPerSemanticType, accuracyPerSteps, accuracyPerLength {key: {"accuracy": percent, "count": n}}.
    Where the official program would fail (missing predictions, an entailed question that is not in the file, no balanced question in a
    global group, ...) it raises ValueError with the ids. Source: GQA eval.py 1.1.
    """
    if not isinstance(questions, dict):
        raise ValueError(f"questions must be an object of questions by id, found {type(questions).__name__}")
    answers = {
        question_id: field(record, "prediction", f"the prediction for {question_id!r}")
        for question_id, record in _last_by_id(predictions, "predictions", "prediction").items()
    }
    missing = [
        question_id
        for question_id, question in questions.items()
        if question_id not in answers and (consistency or field(question, "isBalanced", f"question {question_id!r}"))
    ]
    if missing:
        needed = "each question (consistency)" if consistency else "each balanced question"
        raise ValueError(f"a prediction is needed for {needed}; missing predictions {name_ids(missing)}")
    maps = None
    if grounding:
        if attentions is None or scene_graphs is None:
            absent = [name for name, given in (("attentions", attentions), ("scene_graphs", scene_graphs)) if given is None]
            raise ValueError(f"grounding needs attentions and scene_graphs, but {' and '.join(absent)} not given")
        maps = {key: record["attention"] for key, record in _last_by_id(attentions, "attentions", "attention").items()}

    scores = defaultdict(list)
    blocks = {name: defaultdict(list) for name in BLOCKS}
    groups: dict = {}  # global group -> (gold counts, predicted counts)
    for question_id, question in questions.items():
        try:
            if not field(question, "isBalanced", "the question"):
                continue
            predicted = answers[question_id]
            gold = field(question, "answer", "the question")
            score = 1.0 if predicted == gold else 0.0
            types = field(question, "types", "the question")
            structural = field(types, "structural", "its types")
            scores["accuracy"].append(score)
            scores["open" if structural == "query" else "binary"].append(score)
            blocks["accuracyPerStructuralType"][structural].append(score)
            blocks["accuracyPerSemanticType"][field(types, "semantic", "its types")].append(score)
            blocks["accuracyPerSteps"][_count_steps(question)].append(score)
            blocks["accuracyPerLength"][len(field(question, "question", "the question").split())].append(score)
            if choices is not None:
                entry = field(choices, question_id, "the choices file")
                for metric, key in (("validity", "valid"), ("plausibility", "plausible")):
                    allowed = field(entry, key, "its choices")
                    if "Common" in field(types, "detailed", "its types"):
                        allowed = COMMON_ATTRIBUTES
                    scores[metric].append(1.0 if predicted in allowed else 0.0)
            if maps is not None:
                scene = field(scene_graphs, field(question, "imageId", "the question"), "the scene graph file")
                scores["grounding"].append(grounding_score(question, scene, field(maps, question_id, "the attentions"), map_size))
            if (group := field(field(question, "groups", "the question"), "global", "its groups")) is not None:
                gold_counts, predicted_counts = groups.setdefault(group, (defaultdict(int), defaultdict(int)))
                gold_counts[gold] += 1
                predicted_counts[predicted] += 1
            if consistency:
                entailed = [other for other in field(question, "entailed", "the question") if other != question_id]
                if score and entailed:
                    scores["consistency"].append(_entailed_accuracy(entailed, questions, answers))
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            raise ValueError(f"question {question_id!r}: {error}") from None

    asked = {
        "consistency": consistency, "validity": choices is not None, "plausibility": choices is not None, "grounding": grounding,
    }  # fmt: skip
    result = {
        metric: (mean(scores[metric]) * 100 if scores[metric] else 0.0) if asked.get(metric, True) else None
        for metric in METRICS
        if metric != "distribution"
    }
    result["distribution"] = _chi_square(groups) / 100
    for name, block in blocks.items():
        result[name] = {key: {"accuracy": mean(values) * 100, "count": len(values)} for key, values in block.items()}
    return result


def report(scores: dict) -> str:
    """The lines of the official program for what `evaluate` returned (or what a scores file kept of it); a None has no line."""
    lines = []
    for metric in METRICS:
        if scores.get(metric) is not None:
            suffix = " (lower is better)" if metric == "distribution" else "%"
            lines.append(f"{metric.capitalize()}: {scores[metric]:.2f}{suffix}")
    for name, title in BLOCKS.items():
        lines += ["", f"{title}:"]
        for key in sorted(scores[name], key=lambda key: (int(key), "") if str(key).isdigit() else (-1, key)):  # JSON keys are strings
            lines.append(f"  {key}: {scores[name][key]['accuracy']:.2f}% ({scores[name][key]['count']} questions)")
    return "\n".join(lines)


def _last_by_id(records, what: str, key: str) -> dict:
    """{questionId: record}, the last winning; every record must have `key`, as the official program reads all of them."""
    indexed = index_records(records, "questionId", what)
    for record in records:
        field(record, key, f"the entry for {record['questionId']!r} in {what}")
    return indexed


def _count_steps(question: dict) -> int:
    """Semantic entries that are reasoning steps; the excluded words are looked for in "operation: argument", argument included."""
    steps = field(question, "semantic", "the question")
    texts = [f"{field(step, 'operation', 'a semantic step')}: {field(step, 'argument', 'a semantic step')}" for step in steps]
    return sum(not any(word in text for word in NOT_STEPS) for text in texts)


def _entailed_accuracy(entailed: list, questions: dict, answers: dict) -> float:
    """Share of the entailed questions answered right, repeats counted again."""
    if unknown := [other for other in entailed if other not in questions]:
        raise ValueError(f"entails questions that are not in the file, {name_ids(unknown)}; consistency needs the file of all questions")
    return mean([1.0 if answers[other] == field(questions[other], "answer", f"entailed question {other!r}") else 0.0 for other in entailed])


def _chi_square(groups: dict) -> float:
    """Mean over groups, weighted by their questions, of the chi-square distance of predicted from gold answer counts.

    Predicted answers that are never gold in a group are not counted. Raises ValueError without any group.
    """
    if not groups:
        raise ValueError("the distribution score needs a balanced question with a global group; found none")
    weighted, total = 0.0, 0
    for gold, predicted in groups.values():
        distance = plain_sum((predicted.get(answer, 0) - expected) ** 2 / expected for answer, expected in gold.items())
        questions = sum(gold.values())
        weighted += distance * questions
        total += questions
    return weighted / total


if __name__ == "__main__":
    from eval_vqa.command_line import main

    sys.exit(main("gqa"))
