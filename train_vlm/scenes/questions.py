"""Questions about a scene: text, answer and the types under which the official files count them."""

import random
from dataclasses import dataclass

from train_vlm.scenes.balance import SHARES, Balance
from train_vlm.scenes.forms import UNANSWERABLE, WORDINGS, Ref, say
from train_vlm.scenes.scene import Scene
from train_vlm.scenes.scene_view import SceneView

__all__ = ["QUESTION_TYPES", "Question", "questions"]

# The 65 question types of VQAv2: a question has the longest one that it starts with, or "none of the above".
QUESTION_TYPES = tuple(
    "how many; is the; what; what color is the; what is the; is this; is this a; what is; are the; what kind of; is there a; what type of; "
    "is it; what are the; where is the; is there; does the; what color are the; are these; are there; which; is; what is the man; "
    "is the man; are; how; does this; what is on the; what does the; how many people are; what is in the; what is this; do; what are; "
    "are they; what time; what sport is; are there any; is he; what color is; why; where are the; what color; who is; what animal is; "
    "is the woman; is this an; do you; how many people are in; what room is; has; is this person; what is the woman; can you; why is the; "
    "is the person; what is the color of the; what is the person; could; was; is that a; what number is; what is the name; what brand; "
    "none of the above".split("; ")
)
_KNOWN_TYPES = frozenset(QUESTION_TYPES)


@dataclass(frozen=True)
class Question:
    """One question with its true answer (lower case, digits for numbers); `a`, `b`, `c`, `p` fill its form (see forms.py)."""

    kind: str
    form: str
    pattern: str
    text: str
    answer: str
    a: Ref | None = None
    b: Ref | None = None
    c: str | None = None
    p: str | None = None

    @property
    def question_type(self) -> str:
        """VQAv2's question type: the longest of the 65 that the question starts with."""
        words = self.text.lower().rstrip("?").replace(",", "").split()
        for length in range(min(6, len(words)), 0, -1):
            if (start := " ".join(words[:length])) in _KNOWN_TYPES:
                return start
        return "none of the above"

    @property
    def answer_type(self) -> str:
        """VQAv2's answer type: yes/no, number or other."""
        return "yes/no" if self.answer in ("yes", "no") else "number" if self.answer.isdigit() else "other"

    @property
    def is_answerable(self) -> bool:
        return self.answer != UNANSWERABLE


def questions(scene: Scene, rng: random.Random, count: int = 8, balance: Balance | None = None) -> list[Question]:
    """`count` questions about `scene` (fewer only where nothing more can be asked). Pass one `balance` for all the pictures of a set:
    its running counts are what keeps answers level; without it a fresh one with the usual shares serves."""
    asked = []
    for candidate in (balance or Balance(SHARES)).choose(SceneView(scene), count, rng):
        a, b, c, p = candidate.a, candidate.b, candidate.c, candidate.p
        text = say(candidate.form, rng.randrange(len(WORDINGS[candidate.form])), a, b, c, p)
        asked.append(Question(candidate.kind, candidate.form, candidate.pattern, text, candidate.answer, a, b, c, p))
    return asked
