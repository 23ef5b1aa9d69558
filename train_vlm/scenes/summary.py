"""What a run wrote, in numbers: shares of kinds and tiles, and what an answer given blindly would score.

The blind baselines are fitted on the training questions and counted on each set by equality of answers: the majority per VQAv2 question
type, per form, and per exact text (where that text was seen often enough; else per form). They tell whether wording gives answers away.
"""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable

from train_vlm.scenes.build import Picture
from train_vlm.scenes.forms import KINDS
from train_vlm.scenes.questions import Question

__all__ = ["Blind", "describe_set", "table"]

OFTEN = 10  # times a text must have been seen in training for its own majority to be taken


def _by_type(question: Question) -> tuple:
    return (question.question_type,)


def _by_form(question: Question) -> tuple:
    return (question.form, question.pattern)


def _by_text(question: Question) -> tuple:
    return (question.text,)


class Blind:
    """Majority answers of the training questions."""

    def __init__(self, asked: list[Question]):
        self.counts: dict[str, dict[tuple, Counter]] = {}
        for name, key in (("type", _by_type), ("form", _by_form), ("text", _by_text)):
            self.counts[name] = defaultdict(Counter)
            for question in asked:
                self.counts[name][key(question)][question.answer] += 1

    def by_question_type(self, question: Question) -> str | None:
        return self._majority("type", _by_type(question))

    def by_form(self, question: Question) -> str | None:
        return self._majority("form", _by_form(question))

    def by_text(self, question: Question) -> str | None:
        seen = self.counts["text"].get(_by_text(question), Counter())
        return seen.most_common(1)[0][0] if seen.total() >= OFTEN else self.by_form(question)

    def _majority(self, name: str, key: tuple) -> str | None:
        seen = self.counts[name].get(key)
        return seen.most_common(1)[0][0] if seen else None


def describe_set(pictures: list[Picture], blind: Blind, seconds: float) -> dict:
    """Counts, percentages and hashes of one set; `seconds` are the processor's."""
    asked = [question for picture in pictures for question in picture.questions]
    kinds = Counter(question.kind for question in asked)
    tiles = Counter(picture.scene.grid[0] * picture.scene.grid[1] for picture in pictures)

    def right(guess: Callable[[Question], str | None], among: list[Question]) -> float:
        return _percent(sum(guess(question) == question.answer for question in among), len(among))

    return {
        "pictures": len(pictures),
        "questions": len(asked),
        "kinds_percent": {kind: _percent(kinds[kind], len(asked)) for kind in KINDS if kinds[kind]},
        "kinds": {kind: kinds[kind] for kind in KINDS if kinds[kind]},
        "tiles_percent": {
            "one": _percent(tiles[1], len(pictures)),
            "two or three": _percent(tiles[2] + tiles[3], len(pictures)),
            "four to six": _percent(tiles[4] + tiles[5] + tiles[6], len(pictures)),
        },
        "unanswerable_percent": _percent(sum(not question.is_answerable for question in asked), len(asked)),
        "blind_percent": {
            "majority per question type": right(blind.by_question_type, asked),
            "majority per form": right(blind.by_form, asked),
            "majority per text": right(blind.by_text, asked),
        },
        "blind_percent_per_kind": {
            kind: right(blind.by_text, [question for question in asked if question.kind == kind]) for kind in KINDS if kinds[kind]
        },
        "pictures_sha256": hashlib.sha256("".join(picture.sha256 for picture in pictures).encode()).hexdigest(),
        "processor_seconds": round(seconds, 2),
        "scenes_per_processor_second": round(len(pictures) / max(seconds, 1e-9), 1),
    }


def _percent(part: int, whole: int) -> float:
    return round(100 * part / whole, 2) if whole else 0.0


def table(summary: dict) -> str:
    """The summary for people: one line per set, then the kinds."""
    sets = summary["sets"]
    heads = f"{'set':<16}{'pictures':>9}{'questions':>10}{'1 tile':>8}{'2-3':>7}{'4-6':>7}{'blind':>7}{'no answer':>11}"
    lines = [f"{heads}{'scenes/s/core':>15}"]
    for name, row in sets.items():
        tiles = "".join(f"{share:>{width}.1f}" for share, width in zip(row["tiles_percent"].values(), (8, 7, 7), strict=True))
        lines.append(
            f"{name:<16}{row['pictures']:>9}{row['questions']:>10}{tiles}{row['blind_percent']['majority per text']:>7.1f}"
            f"{row['unanswerable_percent']:>11.1f}{row['scenes_per_processor_second']:>15.1f}"
        )
    lines += ["", f"{'kind, % of questions':<22}" + "".join(f"{name.removeprefix('heldout/'):>9}" for name in sets)]
    for kind in KINDS:
        lines.append(f"{kind:<22}" + "".join(f"{row['kinds_percent'].get(kind, 0.0):>9.1f}" for row in sets.values()))
    lines.append(f"VizWiz ceiling (best constant answer per question): {summary['vizwiz_ceiling_percent']:.2f} %")
    return "\n".join(lines)
