"""What is asked and what is answered: the two data classes that evaluation, demo and server share with the engine."""

import math
from dataclasses import dataclass

__all__ = ["Answer", "Request", "TokenLogprobs"]

MOST_LOGPROBS = 20  # as with OpenAI's top_logprobs


@dataclass(frozen=True)
class Request:
    """One question. Raises ValueError for settings that cannot be met.

    messages: OpenAI-style; images as paths or Pillow images. max_new_tokens: longest answer in tokens. temperature: 0 is greedy.
    top_p: share of probability that is drawn from. seed: of this request's own draws; None takes one from torch's generator.
    stop: texts that end the answer. score_texts: texts whose log-probability as (the start of) the answer is wanted. logprobs: how many of
    the likeliest tokens are told, with their log-probabilities, beside each token said (0: that one alone); None tells nothing.
    thinking: a reasoning checkpoint's switch, None is its own habit; its thoughts stand in the answer's text between `<think>` and
    `</think>`, and `vlm.thinking.strip_thinking` takes them off.
    """

    messages: list
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    score_texts: tuple[str, ...] = ()
    thinking: bool | None = None
    logprobs: int | None = None

    def __post_init__(self):
        for name in ("max_new_tokens", "seed", "logprobs"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | None) or (value is None and name == "max_new_tokens"):
                raise ValueError(f"{name} is {value!r}; expected a whole number")
        if self.logprobs is not None and not 0 <= self.logprobs <= MOST_LOGPROBS:
            raise ValueError(f"logprobs is {self.logprobs}; expected 0 to {MOST_LOGPROBS}")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens is {self.max_new_tokens}; expected at least 1")
        numbers = all(isinstance(value, int | float) for value in (self.temperature, self.top_p))
        if not numbers or not 0 <= self.temperature < math.inf or not 0 < self.top_p <= 1:  # so written, NaN is refused too
            raise ValueError(f"temperature is {self.temperature} and top_p {self.top_p}; expected temperature >= 0 and 0 < top_p <= 1")
        for name in ("stop", "score_texts"):
            texts = getattr(self, name)
            texts = () if texts is None else (texts,) if isinstance(texts, str) else texts
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name} is {texts!r}; expected texts")
            object.__setattr__(self, name, tuple(texts))


@dataclass(frozen=True)
class TokenLogprobs:
    """A token said, the natural log of its probability, and the likeliest ones at its place, likeliest first. These are the model's own
    (temperature 1, all of the vocabulary), whatever temperature and top_p it was drawn with."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Answer:
    """text; stop_reason: "end" (end of turn), "length", "stop", "cancelled" or "error"; error: why there is no answer.

    prompt_tokens, of which visual_tokens are of images and shared_tokens were not computed for this request alone (a shared prefix or a
    kept state); generated_tokens, without the end of turn; tokens: their ids. seconds from admission to the end, waited_seconds before
    admission, first_token_seconds from admission to the first token. scores: {text: natural log of the probability of its tokens} for
    the request's score_texts, None when it had none. logprobs: one for each of `tokens`, None when the request asked for none.
    """

    text: str
    stop_reason: str
    prompt_tokens: int = 0
    visual_tokens: int = 0
    generated_tokens: int = 0
    seconds: float = 0.0
    error: str | None = None
    tokens: tuple[int, ...] = ()
    scores: dict[str, float] | None = None
    shared_tokens: int = 0
    waited_seconds: float = 0.0
    first_token_seconds: float = 0.0
    logprobs: tuple[TokenLogprobs, ...] | None = None
