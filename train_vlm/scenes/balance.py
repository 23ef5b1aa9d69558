"""Which of the possible questions are asked: quotas that keep kinds, forms and answers level.

A model that never looks must not profit: within a form (and the make-up of its descriptions) every answer should come up equally
often. The running counts steer that: the kind that is furthest behind its share comes next, then the form that is behind, then its
rarest answer. Counts belong to one chunk of pictures, so that the outcome does not depend on how many processes draw.
"""

import random
from collections import Counter

from train_vlm.scenes.candidates import candidates
from train_vlm.scenes.forms import UNANSWERABLE
from train_vlm.scenes.scene_view import Candidate, SceneView

__all__ = ["GQA_SHARES", "SHARES", "TRAIN_SHARES", "TRAIN_VIZWIZ_SHARES", "VIZWIZ_SHARES", "Balance"]

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
# In training the kinds that take long to learn come more often, those that are learnt with the captions less.
TRAIN_SHARES = SHARES | {
    "presence": 10.0,
    "easy": 17.0,
    "color": 7.0,
    "shape": 7.5,
    "size": 7.5,
    "count": 9.0,
    "place": 10.0,
    "comparison": 15.0,
    "number": 7.0,
    "word": 7.0,
    "logic": 17.0,
    "region": 7.0,
    "unanswerable": 8.0,
    "unprinted": 7.0,
}
TRAIN_VIZWIZ_SHARES = {kind: share * 0.81 for kind, share in TRAIN_SHARES.items()} | {"unanswerable": 14.0, "unprinted": 11.0}
GQA_SHARES = {kind: share for kind, share in SHARES.items() if kind not in ("unanswerable", "unprinted")}


class Balance:
    """Running counts of what was asked, for one set of `shares` (kind: weight)."""

    def __init__(self, shares: dict[str, float]):
        total = sum(shares.values())
        self.shares = {kind: share / total for kind, share in shares.items()}
        self.kinds: Counter[str] = Counter()
        self.forms: Counter[tuple] = Counter()  # (kind, form, pattern)
        self.answers: Counter[tuple] = Counter()  # (kind, form, pattern, answer)
        self.seen_answers: Counter[tuple] = Counter()  # different answers so far of (kind, form, pattern)
        self.answerable: Counter[tuple] = Counter()  # (form, pattern)

    def choose(self, view: SceneView, count: int, rng: random.Random) -> list[Candidate]:
        """`count` questions about one scene in random order, no topic and no question twice; fewer only if it has no more."""
        chosen: list[Candidate] = []
        topics: set = set()
        while len(chosen) < count:
            candidate = self._next(view, chosen, topics, rng)
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

    def _next(self, view: SceneView, chosen: list[Candidate], topics: set, rng: random.Random) -> Candidate | None:
        total = sum(self.kinds.values()) + 1
        times = Counter(candidate.kind for candidate in chosen)
        # A kind that came up in this picture already waits for the others.
        order = sorted(self.shares, key=lambda k: (times[k], self.kinds[k] - self.shares[k] * (total + rng.random() * 8)))
        for kind in order:
            cells: dict[tuple[str, str, str], list[Candidate]] = {}
            for candidate in candidates(view, kind):
                if topics.isdisjoint(candidate.topics) and candidate not in chosen:
                    cells.setdefault((candidate.form, candidate.pattern, candidate.answer), []).append(candidate)
            if cells:
                return rng.choice(cells[min(cells, key=lambda cell: (self._excess(kind, *cell), rng.random()))])
        return None

    def _excess(self, kind: str, form: str, pattern: str, answer: str) -> float:
        """How much a form and its answer came up beyond what would be level: the lowest is asked next."""
        asked = self.forms[kind, form, pattern]
        if answer == UNANSWERABLE:  # as a share of the same form's answerable questions
            return asked / (self.answerable[form, pattern] + 1)
        level = asked / (self.seen_answers[kind, form, pattern] or 1)
        return asked + 8 * (self.answers[kind, form, pattern, answer] - level)
