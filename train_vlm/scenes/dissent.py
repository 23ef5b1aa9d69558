"""What ten people answer: the truth most often, else something near it.

The official files hold ten answers per question. In VQAv2 a few people differ, never so many that the truth scores below 100 %. In
VizWiz they differ more, so that even the best single answer falls short on some questions: its mean is the ceiling of the set.
Every answer is as the official normaliser leaves it: lower case, digits, no article, no punctuation.
"""

import random
from collections import Counter

from train_vlm.scenes.forms import UNANSWERABLE
from train_vlm.scenes.questions import Question
from train_vlm.scenes.scene import COLORS, NUMBERS, SHAPES, WORDS

__all__ = ["best_constant", "people_vqav2", "people_vizwiz"]

SYNONYMS = {
    "small": ("little", "tiny", "small one"),
    "large": ("big", "huge", "large one"),
    "left": ("left side", "to left"),
    "right": ("right side", "to right"),
    "above": ("over", "on top"),
    "below": ("under", "beneath"),
    "circle": ("disc", "round"),
    "square": ("box", "rectangle"),
    "cross": ("plus",),
    "purple": ("violet",),
    "pink": ("rose",),
    "yellow": ("gold",),
    "yes": ("yes there is", "yep"),
    "no": ("nope", "not there"),
}
OPPOSITES = {"yes": "no", "small": "large", "left": "right", "above": "below"}
OPPOSITES |= {second: first for first, second in OPPOSITES.items()}
NO_IDEA = ("not sure", "unknown", "nothing", "0", "no idea")
LIKE = {
    "color": COLORS,
    "region_color": COLORS,
    "shape": SHAPES,
    "region_shape": SHAPES,
    "larger": SHAPES,
    "smaller": SHAPES,
    "number": NUMBERS,
    "word": WORDS,
    "size": ("small", "large"),
    "left_right": ("left", "right"),
    "above_below": ("above", "below"),
}


def people_vqav2(question: Question, rng: random.Random) -> list[str]:
    """Ten answers, at least six of them true and no other one given three times."""
    agree = rng.choices((10, 9, 8, 7, 6), (55, 20, 13, 8, 4))[0]
    return _mix(question.answer, agree, _other_answers(question, rng), rng, most=2)


def people_vizwiz(question: Question, rng: random.Random) -> list[str]:
    """Ten answers; the true one is the most frequent, but sometimes only two or three people give it."""
    others = _other_answers(question, rng)
    others = others + [answer for answer in (UNANSWERABLE, "unsuitable") if answer != question.answer and answer not in others]
    agree = rng.choices((10, 9, 8, 7, 6, 5, 4, 3, 2), (16, 14, 14, 11, 10, 9, 8, 11, 7))[0]
    while (10 - agree) > (agree - 1) * len(others):
        agree += 1
    return _mix(question.answer, agree, others, rng, most=agree - 1)


def best_constant(answers: list[str]) -> float:
    """The soft score (0 to 1) of the best single answer to ten human ones: leave one out, three agreeing are enough."""
    number = len(answers)
    return max((m * min(1, (m - 1) / 3) + (number - m) * min(1, m / 3)) / number for m in Counter(answers).values())


def _other_answers(question: Question, rng: random.Random) -> list[str]:
    """Plausible other answers in random order, none of them the true one."""
    truth = question.answer
    others = list(SYNONYMS.get(truth, ()))
    if truth in OPPOSITES:
        others.append(OPPOSITES[truth])
    if question.form.startswith("count"):
        others += [str(number) for number in range(int(truth) - 2, int(truth) + 4) if number >= 0]
    elif truth == UNANSWERABLE:
        others += [*rng.sample(LIKE[question.form], 2), *NO_IDEA, "unsuitable"]
    elif question.form in LIKE:
        others += rng.sample(LIKE[question.form], min(6, len(LIKE[question.form])))
    others = [answer for answer in dict.fromkeys(others) if answer != truth]
    rng.shuffle(others)
    return others


def _mix(truth: str, agree: int, others: list[str], rng: random.Random, most: int) -> list[str]:
    """Ten answers in random order: `agree` times the truth, none of the others more than `most` times."""
    answers = [truth] * agree
    # One favourite mistake, the rest as different as possible.
    favourite = [others[0]] * rng.randint(1, max(1, most))
    pool = favourite + [answer for _ in range(most) for answer in others[1:]] + [others[0]] * (most - len(favourite))
    answers += pool[: 10 - agree]
    rng.shuffle(answers)
    return answers
