"""Training samples from the official VQAv2, GQA and VizWiz files, and from captions, in LLaVA's form.

Questions about one picture become turns of one conversation: the picture is then encoded once for all of them. Each question is put as the
evaluators put it (its line of instruction under it, VizWiz' with the offer of "Unanswerable"); a test holds the two together. The answer is
the one most people gave.
"""

from collections import Counter
from pathlib import Path

from train_vlm.json_files import read_json
from train_vlm.scenes.llava_files import SHORT_ANSWER, VIZWIZ_SHORT_ANSWER

__all__ = ["caption_samples", "gqa_samples", "vizwiz_samples", "vqav2_samples"]

CAPTION_PROMPT = "Describe the image in one sentence."


def _rows(path: str | Path, content: dict, key: str, expected: str) -> list[dict]:
    rows = content.get(key)
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        raise ValueError(f"{path} has no list {key!r}; expected {expected}")
    return rows


def _field(row: dict, key: str, path: str | Path):
    if key not in row:
        raise ValueError(f"{path}: an entry has no {key!r}: {str(row)[:80]}")
    return row[key]


def _majority(answers: list, path: str | Path) -> str:
    """The answer most people gave; of several, the one that came first."""
    texts = [str(_field(answer, "answer", path)) for answer in answers]
    if not texts:
        raise ValueError(f"{path}: an entry has no answers; a test split cannot be trained on")
    return Counter(texts).most_common(1)[0][0]


def _conversations(asked: dict[str, list[tuple[str, str]]], line: str, per_sample: int) -> list[dict]:
    """{image path: (question, answer) pairs} -> LLaVA samples of at most `per_sample` questions each."""
    samples = []
    for image, pairs in asked.items():
        for start in range(0, len(pairs), per_sample):
            turns = []
            for question, answer in pairs[start : start + per_sample]:
                mark = "" if turns else "<image>\n"
                turns += [{"from": "human", "value": f"{mark}{question}\n{line}"}, {"from": "gpt", "value": answer}]
            samples.append({"id": f"{Path(image).stem}/{start}", "image": image, "conversations": turns})
    return samples


def vqav2_samples(questions: str | Path, annotations: str | Path, images: Path, *, per_sample: int = 8) -> list[dict]:
    """v2_OpenEnded_mscoco_SPLIT_questions.json and v2_mscoco_SPLIT_annotations.json; images in IMAGES or IMAGES/SPLIT.

    Raises FileNotFoundError, or ValueError for another layout or annotations that do not belong to the questions.
    """
    expected = "the official VQAv2 file"
    asked_file, answered_file = read_json(questions, dict, expected), read_json(annotations, dict, expected)
    split = str(_field(asked_file, "data_subtype", questions))
    answers = {}
    for row in _rows(annotations, answered_file, "annotations", expected):
        found = row.get("multiple_choice_answer")
        answers[_field(row, "question_id", annotations)] = (
            str(found) if found is not None else _majority(row.get("answers", []), annotations)
        )
    folder = f"{split}/" if (images / split).is_dir() else ""
    asked: dict[str, list[tuple[str, str]]] = {}
    lost = []
    for row in _rows(questions, asked_file, "questions", expected):
        identity, number = _field(row, "question_id", questions), _field(row, "image_id", questions)
        if identity not in answers:
            lost.append(identity)
            continue
        pairs = asked.setdefault(f"{folder}COCO_{split}_{int(number):012d}.jpg", [])
        pairs.append((str(_field(row, "question", questions)), answers[identity]))
    if lost:
        raise ValueError(
            f"{len(lost)} questions of {questions} have no annotation in {annotations}, first {lost[0]}; expected one split's two"
        )
    return _conversations(asked, SHORT_ANSWER, per_sample)


def gqa_samples(path: str | Path, images: Path, *, per_sample: int = 8) -> list[dict]:
    """SPLIT_questions.json, or a folder with its pieces; images as IMAGES/ID.jpg or IMAGES/images/ID.jpg. Errors as `vqav2_samples`."""
    path = Path(path)
    pieces = sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not pieces:
        raise FileNotFoundError(f"no JSON files in {path}; expected GQA's questions")
    folder = "images/" if (images / "images").is_dir() else ""
    asked: dict[str, list[tuple[str, str]]] = {}
    for piece in pieces:
        for row in read_json(piece, dict, "GQA's questions by id").values():
            if not isinstance(row, dict):
                raise ValueError(f"{piece} holds {str(row)[:40]!r}; expected GQA's questions by id")
            pairs = asked.setdefault(f"{folder}{_field(row, 'imageId', piece)}.jpg", [])
            pairs.append((str(_field(row, "question", piece)), str(_field(row, "answer", piece))))
    if not asked:
        raise ValueError(f"{path} holds no questions; expected at least one")
    return _conversations(asked, SHORT_ANSWER, per_sample)


def vizwiz_samples(path: str | Path) -> list[dict]:
    """train.json or val.json; images by their names in it. Questions nobody could answer are learnt as "unanswerable"."""
    asked: dict[str, list[tuple[str, str]]] = {}
    for row in read_json(path, list, "VizWiz' list of questions"):
        if not isinstance(row, dict):
            raise ValueError(f"{path} holds {str(row)[:40]!r}; expected VizWiz' list of questions")
        answer = "unanswerable" if row.get("answerable") == 0 else _majority(row.get("answers", []), path)
        asked.setdefault(str(_field(row, "image", path)), []).append((str(_field(row, "question", path)), answer))
    if not asked:
        raise ValueError(f"{path} holds no questions; expected at least one")
    return _conversations(asked, VIZWIZ_SHORT_ANSWER, 1)


def caption_samples(path: str | Path) -> list[dict]:
    """COCO captions ({"images", "annotations"}), or a list of {"image", "caption"}; a sample for each caption."""
    content = read_json(path, dict | list, "COCO captions, or a list of {'image', 'caption'}")
    if isinstance(content, dict):
        names = {_field(row, "id", path): str(_field(row, "file_name", path)) for row in _rows(path, content, "images", "COCO captions")}
        pairs = []
        for row in _rows(path, content, "annotations", "COCO captions"):
            number = _field(row, "image_id", path)
            if number not in names:
                raise ValueError(f"{path}: a caption is of image {number}, which is not among its images")
            pairs.append((names[number], _field(row, "caption", path)))
    else:
        if not all(isinstance(row, dict) for row in content):
            raise ValueError(f"{path} holds {str(content)[:40]!r}; expected a list of {{'image', 'caption'}}")
        pairs = [(str(_field(row, "image", path)), _field(row, "caption", path)) for row in content]
    if not pairs:
        raise ValueError(f"{path} holds no captions; expected at least one")
    counts, samples = Counter(), []
    for image, caption in pairs:
        words = "" if caption is None else str(caption).strip()  # without any the writer counts it: nothing supervised
        turns = [{"from": "human", "value": f"<image>\n{CAPTION_PROMPT}"}, {"from": "gpt", "value": words}]
        samples.append({"id": f"{Path(image).stem}/{counts[image]}", "image": image, "conversations": turns})
        counts[image] += 1
    return samples
