"""One batch of questions through the engine, each answer a row of predictions.jsonl.

VizWiz's second task wants the confidence that a question can be answered. It comes from the same pass: the engine is asked for the
log-probability that the answer is "unanswerable", in both spellings that models of this family have learnt. Where the model is to think
first there is no such probability, and no file for that task.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import closing
from itertools import groupby
from operator import attrgetter

from eval_vqa.image_files import grey_like, load_image
from eval_vqa.official_files import Question
from eval_vqa.postprocessing import POSTPROCESSING, without_thinking
from eval_vqa.predictions_file import RESULT_KEYS, result
from eval_vqa.prompts import PROMPTS, render_prompt

__all__ = ["UNANSWERABLE", "Asker"]

UNANSWERABLE = ("unanswerable", "Unanswerable")
OPENING_THREADS, PICTURES_AHEAD = 2, 4


class Asker:
    """Asks an engine and writes rows. settings: a PredictSettings; write: takes a row; make_request: see `eval_vqa.predicting.predict`.
    Raises ValueError when a checkpoint without that switch is to think."""

    def __init__(self, task: str, engine, settings, write: Callable[[dict], None], make_request: Callable | None = None):
        if make_request is None:
            from vlm.engine import Request as make_request
        self.task, self.engine, self.settings, self.write, self.make_request = task, engine, settings, write, make_request
        self.options = {"max_new_tokens": settings.max_new_tokens}
        known = getattr(make_request, "__dataclass_fields__", {})
        if "thinking" in known:  # said always: the habit of a reasoning checkpoint is to think, and no thought ends within a short answer
            self.options["thinking"] = settings.thinking
        if task == "vizwiz" and "score_texts" in known and not settings.thinking:  # thoughts begin otherwise than answers
            self.options["score_texts"] = UNANSWERABLE
        if settings.thinking and (processor := getattr(engine, "processor", None)) is not None:
            processor.renderer.chat_format.answer_opening(True)  # one error now, or the same one for every question

    def ask(self, batch: list[Question]) -> None:
        """Writes one row for each question; those of one image stand side by side. Raises ValueError for an unreadable image when that is
        to stop the run."""
        asked: list[tuple[Question, dict]] = []
        written: set[int] = set()

        def on_answer(index: int, answer) -> None:
            if index not in written:
                written.add(index)
                self.write(self._row(*asked[index], answer))

        with closing(_Requests(self, batch, asked)) as requests:
            for index, answer in enumerate(self.engine.generate(requests, on_answer=on_answer)):
                on_answer(index, answer)
        if len(written) != len(asked):
            raise RuntimeError(f"the engine gave {len(written)} answers to {len(asked)} requests")

    def _request(self, question: Question, image):
        """What the engine is asked."""
        text = render_prompt(PROMPTS[self.task], question.text)
        content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
        return self.make_request(messages=[{"role": "user", "content": content}], **self.options)

    def _picture(self, questions: list[Question]) -> tuple:
        """Of questions about one image: (they, image, what a row says of it); (they, None, the problem) for one that cannot be read."""
        question = questions[0]
        try:
            image, digest = load_image(question.image)
            image = grey_like(image) if self.settings.grey else image
        except (FileNotFoundError, ValueError) as error:
            return questions, None, {"problem": str(error)}
        return questions, image, {"image_file": question.image.name, "image_sha256": digest, "tiles_wanted": self._tiles(image)}

    def _tiles(self, image) -> int | None:
        """How many tiles the processor cuts this image into, when nothing forces it to fewer."""
        from vlm.tiling import upright

        processor = getattr(self.engine, "processor", None)
        return None if processor is None else processor.image_processor.count_tiles(*upright(image).size)

    def _write_unreadable(self, question: Question, problem: str) -> None:
        """A row without an answer, or with an empty one. Raises ValueError where that is to stop the run."""
        if self.settings.on_missing == "fail":
            raise ValueError(f"question {question.id!r}: {problem}; --on-missing skip or blank goes on without it")
        blank = self.settings.on_missing == "blank"
        row = result(self.task, question.id, "") if blank else {RESULT_KEYS[self.task][0]: question.id}
        self.write({**row, "problem": problem})

    def _row(self, question: Question, circumstances: dict, answer) -> dict:
        if answer.error:  # counted as a wrong answer, listed, and asked again at the next start
            return {**result(self.task, question.id, ""), "problem": f"the engine failed: {answer.error}"}
        postprocess, _ = POSTPROCESSING[self.task]
        row = {
            **result(self.task, question.id, postprocess(without_thinking(answer.text))),
            "text": answer.text,
            "stop_reason": answer.stop_reason,
            "prompt_tokens": answer.prompt_tokens,
            "visual_tokens": answer.visual_tokens,
            "generated_tokens": answer.generated_tokens,
            "seconds": round(answer.seconds, 4),
            **circumstances,
        }
        wanted = row.pop("tiles_wanted")
        if wanted is not None:
            row["tiles"] = answer.visual_tokens // self.engine.processor.visual_tokens_per_tile
            if row["tiles"] != wanted:
                row["tiles_wanted"] = wanted  # fewer were used, to fit the engine's longest prompt
        if scores := getattr(answer, "scores", None):
            row["answerable"] = 1.0 - min(1.0, sum(math.exp(scores[text]) for text in UNANSWERABLE if text in scores))
        return row


class _Requests(Iterator):
    """Requests of questions, taken as the engine has room, so that few pictures are in memory: other threads open them, while it computes.
    Each is noted in `asked`, and what cannot be read is written."""

    def __init__(self, asker: Asker, questions: list[Question], asked: list[tuple[Question, dict]]):
        from PIL import Image

        from vlm.prefetching import Prefetcher

        Image.init()  # by one thread: Pillow loads its formats at the first picture, and two threads would disturb each other
        of_one_image = [list(group) for _, group in groupby(questions, key=attrgetter("image"))]  # they are neighbours
        self.asker, self.asked = asker, asked
        self._opened = Prefetcher(asker._picture, of_one_image, workers=OPENING_THREADS, most=PICTURES_AHEAD)
        self._left: deque[tuple] = deque()

    @property
    def can_go_on(self) -> bool:
        """The next request, or the end, waits for no picture to be opened; but behind one that cannot be read it may."""
        return bool(self._left) or self._opened.can_go_on

    def __next__(self):
        while not self._left:
            questions, image, circumstances = next(self._opened)
            for question in questions:
                if image is None:
                    self.asker._write_unreadable(question, circumstances["problem"])
                else:
                    self._left.append((question, image, circumstances))
        question, image, circumstances = self._left.popleft()
        self.asked.append((question, circumstances))
        return self.asker._request(question, image)

    def close(self) -> None:
        self._opened.close()
