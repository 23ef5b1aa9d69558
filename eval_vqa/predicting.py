"""Asks the model every question of a split, so that a kill costs what was in the engine and the answers that came last, and nothing else is
asked twice.

OUT/run.json       what was asked of what: written first, and completed with counts and problems at the end
OUT/predictions.jsonl   one line per question as it is answered, by any number of processes
OUT/submission.json     the official results list in the question file's order, written whole at the end
OUT/answerability.json  VizWiz only: the submission of its second task, from the model's probability of "unanswerable"

Questions about one image are asked together, by one process, whatever their order in the file: the engine then encodes the image once. An
image that is missing or cannot be read is an error by default; `skip` leaves its questions out of the submission and `blank` answers
them with an empty string. Both list them in run.json.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from eval_vqa.archives import is_file
from eval_vqa.asking import Asker
from eval_vqa.claims import Claims
from eval_vqa.json_files import write_json
from eval_vqa.official_files import Question
from eval_vqa.official_records import name_ids
from eval_vqa.predictions_file import RESULT_KEYS, PredictionsFile, keep_answered, result
from eval_vqa.progress import Progress
from eval_vqa.ranks import Rank
from eval_vqa.run_record import complete, open_record

__all__ = ["ON_MISSING", "Outcome", "PredictSettings", "predict"]

ON_MISSING = ("fail", "skip", "blank")
SHARES_PER_RANK = 4  # a process takes at most this part of its share at a time, so that none is left with all the rest


@dataclass(frozen=True)
class PredictSettings:
    """How to ask. A run goes on only with the max_new_tokens, grey and thinking it began with."""

    at_a_time: int = 512  # questions that one process claims, and hands to the engine together
    max_new_tokens: int = 16  # an answer that has not ended by then is cut; run.json counts those
    grey: bool = False  # every image replaced by a grey one of its size: what the questions alone give away
    thinking: bool = False  # let a reasoning checkpoint think first; short answers are trained behind its mark of no thoughts
    on_missing: str = "fail"  # what an unreadable image means: one of ON_MISSING

    def __post_init__(self):
        if self.on_missing not in ON_MISSING:
            raise ValueError(f"on_missing must be one of {', '.join(ON_MISSING)}, found {self.on_missing!r}")
        if self.at_a_time < 1 or self.max_new_tokens < 1:
            raise ValueError(f"at_a_time and max_new_tokens must be at least 1, found {self.at_a_time} and {self.max_new_tokens}")


@dataclass
class Outcome:
    """What a run came to: rows of all questions, and the problems among them. Only the first rank has them."""

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
    rank: Rank | None = None,
) -> Outcome:
    """Answers `questions` into the folder `out`, going on where an earlier run stopped, beside whatever other process does the same.

    engine: has generate(iterable of requests, on_answer=callable(index, Answer)) -> list of Answer, as vlm.engine.Engine; or a function
    that makes one.
    identity: what tells this run from another (hashes of model and data); with the settings and the prompt it must equal what run.json
    holds. make_request: takes (messages, max_new_tokens=), by default vlm.engine.Request. rank: which of several processes this is; the
    first waits for all questions and completes the run. Raises ValueError when `out` holds another run, and with on_missing "fail" for an
    unreadable image (what was answered before stays in the file).
    """
    settings, rank, out = settings or PredictSettings(), rank or Rank(), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    record = open_record(out, task, settings, identity or {})
    if settings.on_missing == "fail":
        if absent := [str(image) for image in sorted({question.image for question in questions}) if not is_file(image)]:
            raise ValueError(f"image files not found, {name_ids(absent)}; --on-missing skip or blank goes on without them")
    path = out / "predictions.jsonl"
    with Claims(out) as claims:
        if claims.alone and rank.is_first:
            keep_answered(path, task)  # what failed in an earlier start is asked again
        claims.join()
        log = PredictionsFile(path, task, claims.writing)
        log.refresh()
        before = sum(question.id in log.rows for question in questions)
        others = len(log.rows) - before  # of an earlier, longer list of questions
        began = time.monotonic()
        with Progress(len(questions), before, visible=rank.is_first) as progress:
            if before < len(questions):
                engine = engine if hasattr(engine, "generate") else engine()

            pending = _Pending(log)

            def write(row: dict) -> None:
                pending.add(row)
                rank.check_parent()
                progress.show(len(log.rows) + len(pending.rows) - others)

            asker = Asker(task, engine, settings, write, make_request)
            for batch in _batches(questions, claims, log, settings.at_a_time, rank):
                try:
                    asker.ask(batch)
                finally:
                    pending.write()  # before others may claim these images
        seconds = time.monotonic() - began
    if not rank.is_first:
        return Outcome([])
    rows = [log.rows[question.id] for question in questions]
    _write_submissions(out, task, rows)
    problems = complete(out, task, record, rows, asked=len(questions) - before, seconds=seconds, ranks=rank.world)
    return Outcome(rows, problems)


class _Pending:
    """Rows that are written together, once a second at most: on a file system that eight ranks share a transaction takes milliseconds. What
    comes alone is written at once; of what comes together all but the first waits for the next or for the end of the batch."""

    def __init__(self, log: PredictionsFile, least_seconds: float = 1.0):
        self.log, self.least_seconds = log, least_seconds
        self.rows: list[dict] = []
        self.written = -math.inf

    def add(self, row: dict) -> None:
        self.rows.append(row)
        if time.monotonic() - self.written >= self.least_seconds:
            self.write()

    def write(self) -> None:
        if self.rows:
            self.log.append(*self.rows)
            self.rows, self.written = [], time.monotonic()


def _batches(questions: list[Question], claims: Claims, log: PredictionsFile, size: int, rank: Rank) -> Iterator[list[Question]]:
    """Lists of up to `size` questions that nobody else has, those of one image neighbours, until all are asked.

    Images are numbered by first appearance. Each is claimed while its questions are asked. The first rank goes through them once more and
    waits for what others hold: it gets an image when they have answered it, or when they have died.
    """
    of_image: dict[Path, list[Question]] = {}
    for question in questions:
        of_image.setdefault(question.image, []).append(question)
    groups = list(of_image.values())
    most = min(size, max(1, len(questions) // (rank.world * SHARES_PER_RANK))) if rank.world > 1 else size

    def open_questions(images: list[int]) -> list[Question]:
        return [question for image in images for question in groups[image] if question.id not in log.rows]

    def answer(held: list[int]) -> Iterator[list[Question]]:
        log.refresh()  # another process may have answered them before they were claimed
        todo = open_questions(held)
        for start in range(0, len(todo), size):
            yield todo[start : start + size]
        for image in held:
            claims.release(image)
        held.clear()

    for wait in (False, True) if rank.is_first else (False,):
        held: list[int] = []
        count = 0
        for image in range(len(groups)):
            own = len(open_questions([image]))
            if not own:
                continue
            if not claims.claim(image):
                if not wait:
                    continue
                yield from answer(held)
                count = 0
                claims.claim(image, wait=True)
            held.append(image)
            count += own
            if count >= most:
                yield from answer(held)
                count = 0
        yield from answer(held)
        log.refresh()


def _write_submissions(out: Path, task: str, rows: list[dict]) -> None:
    """The official results files."""
    id_key, answer_key = RESULT_KEYS[task]
    answered = [row for row in rows if answer_key in row]
    write_json(out / "submission.json", [result(task, row[id_key], row[answer_key]) for row in answered])
    if any("answerable" in row for row in answered):
        write_json(out / "answerability.json", [{id_key: row[id_key], "answerable": row.get("answerable", 0.5)} for row in answered])
