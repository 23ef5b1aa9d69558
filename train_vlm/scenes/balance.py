"""Which of the possible questions are asked: quotas that keep kinds, forms and answers level.

A model that never looks must not profit: within a form (and the make-up of its descriptions) every answer should come up equally
often. The running counts steer that: the kind that is furthest behind its share comes next, then the form that is behind, then its
rarest answer. Counts belong to one chunk of pictures, so that the outcome does not depend on how many processes draw.
"""

import math
import random
from collections import Counter

from train_vlm.scenes.candidates import candidates
from train_vlm.scenes.forms import UNANSWERABLE
from train_vlm.scenes.scene_view import Candidate, SceneView

__all__ = ["GQA_SHARES", "LATE_TRAIN_SHARES", "SHARES", "TRAIN_SHARES", "VIZWIZ_SHARES", "Balance", "as_vizwiz"]

# Wanted share of each kind. Number and word can be asked once, of half the pictures: they end near 6 %.
SHARES = {
    "presence": 8.0,
    "color": 9.5,
    "shape": 9.5,
    "size": 7.5,
    "count": 9.0,
    "place": 8.0,
    "comparison": 7.5,
    "number": 8.0,
    "word": 8.0,
    "logic": 7.5,
    "region": 7.5,
    "unanswerable": 6.5,
    "unprinted": 6.0,
}
VIZWIZ_SHARES = {kind: share * 0.81 for kind, share in SHARES.items()}
VIZWIZ_SHARES |= {"number": 7.7, "word": 7.7, "unanswerable": 14.0, "unprinted": 13.2}  # 27 % have no answer
# In training the kinds that take long to learn come more often, those that are learnt with the captions less. The first half of the
# pictures asks what the second half builds on: nothing is learnt from "a circle and a star" before "a circle" is (docs/decisions.md).
TRAIN_SHARES = {
    "presence": 18.0,
    "easy": 17.0,
    "easy_two": 12.0,
    "color": 8.4,
    "shape": 8.0,
    "size": 8.2,
    "count": 9.0,
    "place": 9.0,
    "comparison": 6.0,
    "number": 12.5,
    "word": 12.5,
    "region": 8.4,
    "unanswerable": 8.2,
    "unprinted": 8.0,
}
LATE_TRAIN_SHARES = {
    "presence": 8.0,
    "easy_two": 20.0,
    "color": 6.4,
    "shape": 6.2,
    "size": 6.2,
    "count": 7.5,
    "place": 7.5,
    "comparison": 20.0,
    "number": 9.0,
    "word": 9.0,
    "logic": 25.0,
    "region": 6.6,
    "unanswerable": 6.2,
    "unprinted": 7.5,
}


def as_vizwiz(shares: dict[str, float]) -> dict[str, float]:
    """The shares for pictures with VizWiz' prompt, where more questions have no answer."""
    answered = {kind: share for kind, share in shares.items() if kind not in ("unanswerable", "unprinted")}
    return {kind: 77.0 * share / sum(answered.values()) for kind, share in answered.items()} | {"unanswerable": 13.0, "unprinted": 10.0}


GQA_SHARES = {kind: share for kind, share in SHARES.items() if kind not in ("unanswerable", "unprinted")}
MOST_SURPLUS = 3.0  # of a yes or no: beyond it the other one has to come up first, whatever else there is to ask


class Balance:
    """Running counts of what was asked, for one set of `shares` (kind: weight).

    `beside`: one with other shares for other pictures of the same set; forms and answers are then counted together."""

    def __init__(self, shares: dict[str, float], beside: "Balance | None" = None):
        total = sum(shares.values())
        self.shares = {kind: share / total for kind, share in shares.items()}
        self.kinds: Counter[str] = Counter()
        self.forms: Counter[tuple] = Counter()  # (kind, form, pattern)
        self.answers: Counter[tuple] = Counter()  # (kind, form, pattern, answer)
        self.seen_answers: Counter[tuple] = Counter()  # different answers so far of (kind, form, pattern)
        self.answerable: Counter[tuple] = Counter()  # (form, pattern)
        if beside is not None:
            self.forms, self.answers, self.seen_answers, self.answerable = (
                beside.forms, beside.answers, beside.seen_answers, beside.answerable
            )  # fmt: skip

    def choose(self, view: SceneView, count: int, rng: random.Random) -> list[Candidate]:
        """`count` questions about one scene in random order, no topic and no question twice; fewer only if it has no more."""
        chosen: list[Candidate] = []
        topics: set = set()
        while len(chosen) < count:
            candidate = self._next(view, chosen, topics, count, rng)
            if candidate is None:
                break
            chosen.append(candidate)
            topics.update(candidate.topics)
            self._count(candidate)
        rng.shuffle(chosen)
        return chosen

    def _count(self, candidate: Candidate) -> None:
        form = (candidate.kind, candidate.form, candidate.pattern)
        self.kinds[candidate.kind] += 1
        self.forms[form] += 1
        if not self.answers[*form, candidate.answer]:
            self.seen_answers[form] += 1
        self.answers[*form, candidate.answer] += 1
        if candidate.answer != UNANSWERABLE:
            self.answerable[candidate.form, candidate.pattern] += 1

    def _next(self, view: SceneView, chosen: list[Candidate], topics: set, count: int, rng: random.Random) -> Candidate | None:
        total = sum(self.kinds.values()) + 1
        times = Counter(candidate.kind for candidate in chosen)
        # A kind that has had its part of this picture (its share of `count`, rounded up) waits for the others.
        parts = {kind: times[kind] // math.ceil(share * count) for kind, share in self.shares.items()}
        order = sorted(self.shares, key=lambda k: (parts[k], self.kinds[k] - self.shares[k] * (total + rng.random() * 8)))
        for kind in order:
            cells: dict[tuple[str, str, str], list[Candidate]] = {}
            for candidate in candidates(view, kind):
                is_free = topics.isdisjoint(candidate.topics) and candidate not in chosen
                if is_free and not self._has_to_wait(kind, candidate.form, candidate.pattern, candidate.answer):
                    cells.setdefault((candidate.form, candidate.pattern, candidate.answer), []).append(candidate)
            if cells:
                return rng.choice(cells[min(cells, key=lambda cell: (self._excess(kind, *cell), rng.random()))])
        return None

    def _excess(self, kind: str, form: str, pattern: str, answer: str) -> float:
        """How much a form and its answer came up beyond what would be level: the lowest is asked next."""
        asked = self.forms[kind, form, pattern]
        if answer == UNANSWERABLE:  # as a share of the same form's answerable questions
            return asked / (self.answerable[form, pattern] + 1)
        return asked + 8 * self._surplus(kind, form, pattern, answer)

    def _has_to_wait(self, kind: str, form: str, pattern: str, answer: str) -> bool:
        return answer in ("yes", "no") and self._surplus(kind, form, pattern, answer) > MOST_SURPLUS

    def _surplus(self, kind: str, form: str, pattern: str, answer: str) -> float:
        """How often an answer came up more than each answer of its form would if all were level."""
        level = self.forms[kind, form, pattern] / (self.seen_answers[kind, form, pattern] or 1)
        return self.answers[kind, form, pattern, answer] - level
