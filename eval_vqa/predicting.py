"""Asks the model every question of a split, in batches, so that a kill costs one batch and nothing is asked twice.

OUT/run.json       what was asked of what: written first, and completed with counts and problems at the end
OUT/predictions.jsonl   one line per question as it is answered
OUT/submission.json     the official results list in the question file's order, written whole at the end

Questions about one image are asked together, whatever their order in the file. An image that is missing or cannot be read is an error by
default; `skip` leaves its questions out of the submission and `blank` answers them with an empty string. Both list them in run.json.
"""

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eval_vqa.json_files import read_json, write_json
from eval_vqa.official_files import Question
from eval_vqa.official_records import name_ids
from eval_vqa.postprocessing import POSTPROCESSING
from eval_vqa.predictions_file import RESULT_KEYS, keep_answered, line, read_rows, result
from eval_vqa.prompts import PROMPTS, prompt_sha256, render_prompt

__all__ = ["ON_MISSING", "Outcome", "PredictSettings", "load_image", "predict"]

ON_MISSING = ("fail", "skip", "blank")
GREY = (127, 127, 127)


@dataclass(frozen=True)
class PredictSettings:
    """How to ask. A run goes on only with the max_new_tokens and grey it began with."""

    batch: int = 64  # questions handed to the engine at a time
    max_new_tokens: int = 16  # an answer that has not ended by then is cut; run.json counts those
    grey: bool = False  # every image replaced by a grey one of its size: what the questions alone give away
    on_missing: str = "fail"  # what an unreadable image means: one of ON_MISSING

    def __post_init__(self):
        if self.on_missing not in ON_MISSING:
            raise ValueError(f"on_missing must be one of {', '.join(ON_MISSING)}, found {self.on_missing!r}")
        if self.batch < 1 or self.max_new_tokens < 1:
            raise ValueError(f"batch and max_new_tokens must be at least 1, found {self.batch} and {self.max_new_tokens}")


@dataclass
class Outcome:
    """What a run came to: rows of all questions so far, and the problems among them."""

    rows: list[dict]
    problems: list[dict] = field(default_factory=list)


def predict(
    task: str,
    questions: list[Question],
    engine,
    out: str | Path,
    settings: PredictSettings | None = None,
    *,
    identity: dict | None = None,
    make_request: Callable | None = None,
) -> Outcome:
    """Answers `questions` into the folder `out`, going on where an earlier run stopped.

    engine: has generate(requests, on_answer=callable(index, Answer)) -> list of Answer, as vlm.engine.Engine. identity: what tells this
    run from another (hashes of model and data); with the settings and the prompt it must equal what run.json holds. make_request: takes
    (messages, max_new_tokens=), by default vlm.engine.Request. Raises ValueError when `out` holds another run, and with on_missing
    "fail" for the first batch with an unreadable image (what was answered before stays in the file).
    """
    settings = settings or PredictSettings()
    if make_request is None:
        from vlm.engine import Request as make_request
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    run = _settings_record(task, settings, identity or {})
    _refuse_another_run(out, run)
    if settings.on_missing == "fail":
        if absent := sorted({str(question.image) for question in questions if not question.image.is_file()}):
            raise ValueError(f"image files not found, {name_ids(absent)}; --on-missing skip or blank goes on without them")
    if not (out / "run.json").exists():
        write_json(out / "run.json", run, indent=1)

    id_key, answer_key = RESULT_KEYS[task]
    path = out / "predictions.jsonl"
    done = {row[id_key] for row in keep_answered(path, task)}
    pending = [question for question in questions if question.id not in done]
    began = time.monotonic()
    with open(path, "ab") as file, _progress(len(questions), len(questions) - len(pending)) as bar:

        def write(row: dict) -> None:
            file.write(line(row))
            file.flush()  # a killed process loses nothing that was flushed
            bar.update()

        for batch in _batches(pending, settings.batch):
            _answer_batch(task, batch, engine, settings, make_request, write)
    seconds = time.monotonic() - began

    rows = {row[id_key]: row for row in read_rows(path, task)}
    asked = [rows[question.id] for question in questions]
    problems = [{id_key: row[id_key], "problem": row["problem"]} for row in asked if row.get("problem")]
    write_json(out / "submission.json", [result(task, row[id_key], row[answer_key]) for row in asked if answer_key in row])
    counts = {
        "questions": len(asked),
        "answered": sum(answer_key in row and not row.get("problem") for row in asked),
        "stop_reasons": dict(Counter(row["stop_reason"] for row in asked if row.get("stop_reason"))),
        "visual_tokens": sum(row.get("visual_tokens") or 0 for row in asked),
        "generated_tokens": sum(row.get("generated_tokens") or 0 for row in asked),
        "asked_in_this_start": len(pending),
        "seconds_of_this_start": round(seconds, 2),
    }
    write_json(out / "run.json", {**run, "counts": counts, "problems": problems}, indent=1)
    return Outcome(asked, problems)


def load_image(path: Path):
    """A decoded PIL image. Raises FileNotFoundError or ValueError with the path and what is wrong."""
    from PIL import Image

    if not path.is_file():
        raise FileNotFoundError(f"image {path} not found")
    try:
        image = Image.open(path)
        image.load()
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"image {path} cannot be read: {error}") from None
    return image


def _grey_like(image):
    from PIL import Image, ImageOps

    return Image.new("RGB", ImageOps.exif_transpose(image).size, GREY)


def _answer_batch(task, batch: list[Question], engine, settings: PredictSettings, make_request, write) -> None:
    """One call of the engine; each answer is written as it comes."""
    id_key = RESULT_KEYS[task][0]
    images, requests, asked = {}, [], []
    for question in batch:
        if question.image not in images:
            try:
                image = load_image(question.image)
                images[question.image] = _grey_like(image) if settings.grey else image
            except (FileNotFoundError, ValueError) as error:
                images[question.image] = error
        image = images[question.image]
        if isinstance(image, Exception):
            if settings.on_missing == "fail":
                raise ValueError(f"question {question.id!r}: {image}; --on-missing skip or blank goes on without it")
            answered = result(task, question.id, "") if settings.on_missing == "blank" else {id_key: question.id}
            write({**answered, "problem": str(image)})
            continue
        text = render_prompt(PROMPTS[task], question.text)
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        requests.append(make_request(messages=[{"role": "user", "content": content}], max_new_tokens=settings.max_new_tokens))
        asked.append(question)
    written: set[int] = set()

    def on_answer(index: int, answer) -> None:
        if index not in written:
            written.add(index)
            write(_row(task, asked[index], answer))

    if requests:
        for index, answer in enumerate(engine.generate(requests, on_answer=on_answer)):
            on_answer(index, answer)
    if len(written) != len(requests):
        raise RuntimeError(f"the engine gave {len(written)} answers to {len(requests)} requests")


def _row(task: str, question: Question, answer) -> dict:
    if answer.error:  # counted as a wrong answer, listed, and asked again at the next start
        return {**result(task, question.id, ""), "problem": f"the engine failed: {answer.error}"}
    postprocess, _ = POSTPROCESSING[task]
    return {
        **result(task, question.id, postprocess(answer.text)),
        "text": answer.text,
        "stop_reason": answer.stop_reason,
        "prompt_tokens": answer.prompt_tokens,
        "visual_tokens": answer.visual_tokens,
        "generated_tokens": answer.generated_tokens,
        "seconds": round(answer.seconds, 4),
    }


def _settings_record(task: str, settings: PredictSettings, identity: dict) -> dict:
    return {
        "task": task,
        "prompt": PROMPTS[task],
        "prompt_sha256": prompt_sha256(PROMPTS[task]),
        "postprocessing": POSTPROCESSING[task][1],
        "decoding": "greedy",
        "max_new_tokens": settings.max_new_tokens,
        "grey": settings.grey,
        "on_missing": settings.on_missing,
        **identity,
    }


def _refuse_another_run(out: Path, run: dict) -> None:
    if not (out / "run.json").exists():
        if (out / "predictions.jsonl").exists():
            raise ValueError(f"{out} holds a predictions.jsonl without run.json; choose another --out or remove it")
        return
    earlier = read_json(out / "run.json")
    may_differ = {"on_missing", "model", "versions", "split"}  # places and paths may change; what was asked of what may not
    run = json.loads(json.dumps(run))
    if different := sorted(key for key in run.keys() - may_differ if earlier.get(key) != run[key]):
        found = "; ".join(f"{key} is {earlier.get(key)!r} there and {run[key]!r} now" for key in different)
        raise ValueError(f"{out} holds another run: {found}. Choose another --out, or remove that folder to start over")


def _batches(questions: list[Question], size: int) -> Iterator[list[Question]]:
    """Batches in which questions of one image are neighbours; images in order of first appearance."""
    of_image: dict[Path, list[Question]] = {}
    for question in questions:
        of_image.setdefault(question.image, []).append(question)
    ordered = [question for group in of_image.values() for question in group]
    for start in range(0, len(ordered), size):
        yield ordered[start : start + size]


def _progress(total: int, done: int):
    from tqdm import tqdm

    return tqdm(total=total, initial=done, unit="question", file=sys.stderr, disable=None, dynamic_ncols=True)
