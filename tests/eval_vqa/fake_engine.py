"""An engine without a model, for what predicting does around it."""

import math
from dataclasses import dataclass


@dataclass
class FakeRequest:
    messages: list
    max_new_tokens: int
    score_texts: tuple = ()


@dataclass
class FakeAnswer:
    text: str
    stop_reason: str = "end_of_turn"
    prompt_tokens: int = 5
    visual_tokens: int = 4
    generated_tokens: int = 1
    seconds: float = 0.01
    error: str | None = None
    scores: dict | None = None


class FakeEngine:
    """Says the first pixel and the question; stops with a crash when `crash_after` answers are given."""

    def __init__(self, crash_after=None, fail=()):
        self.asked, self.batches, self.crash_after, self.fail = [], [], crash_after, fail

    def generate(self, requests, on_answer=None):
        requests = list(requests)
        self.batches.append(len(requests))
        answers = []
        for index, request in enumerate(requests):
            if self.crash_after is not None and len(self.asked) >= self.crash_after:
                raise KeyboardInterrupt
            image, text = request.messages[0]["content"]
            self.asked.append((image["image"], text["text"], request.max_new_tokens))
            question = text["text"].split("\n")[0]
            said = f" {image['image'].getpixel((0, 0))} {question}. "
            answer = FakeAnswer("", error="too long") if question in self.fail else FakeAnswer(said)
            if request.score_texts:
                answer.scores = {text: math.log(0.25) for text in request.score_texts}
            on_answer(index, answer)
            answers.append(answer)
        return answers
