"""What the truth of one question implies for others, in forms that are asked anyway."""

from train_vlm.scenes.forms import Ref
from train_vlm.scenes.questions import Question
from train_vlm.scenes.scene_view import Candidate

__all__ = ["implied"]

SWAPPED = {"left": "right", "right": "left", "above": "below", "below": "above"}


def _exists(ref: Ref, answer: str) -> Candidate:
    return Candidate("presence", "exist", answer, "pair", ref)


def implied(question: Question) -> list[Candidate]:
    """Further questions whose answers follow from this one's text and answer alone, each put in a form of forms.py."""
    form, answer, a, b = question.form, question.answer, question.a, question.b
    if form == "color":
        return [Candidate("presence", "is_color", "yes", "shape", a, c=answer), _exists(Ref(a.shape, answer), "yes")]
    if form == "is_color" and answer == "yes":
        return [_exists(Ref(a.shape, question.c), "yes"), Candidate("color", "color", question.c, "shape", a)]
    if form == "shape":
        return [_exists(Ref(answer, a.color), "yes")]
    if form in ("left_right", "above_below"):
        return [Candidate("place", form, SWAPPED[answer], question.pattern, b, a)]
    if form in ("larger", "smaller"):
        other = "smaller" if form == "larger" else "larger"
        loser = str(b) if answer == str(a) else str(a)
        a_larger = (form == "larger") == (answer == str(a))
        return [
            Candidate("comparison", other, loser, "shape", a, b),
            Candidate("comparison", "is_larger", "yes" if a_larger else "no", "shape", a, b),
            Candidate("comparison", "is_larger", "no" if a_larger else "yes", "shape", b, a),
        ]
    if form == "is_larger" and answer == "yes":
        return [Candidate("comparison", "larger", str(a), "shape", a, b), Candidate("comparison", "is_larger", "no", "shape", b, a)]
    if form == "more" and answer == "yes":
        return [Candidate("comparison", "more", "no", "shape", b, a)]
    if form == "same_color":
        return [Candidate("comparison", "same_color", answer, "shape", b, a)]
    if form in ("and", "or") and (answer == "yes") == (form == "and"):
        swapped = Candidate("logic", form, answer, question.pattern, b, a)
        return [swapped, *(_exists(ref, answer) for ref in (a, b) if ref.color)]
    if form == "but_no" and answer == "yes":
        return [_exists(ref, known) for ref, known in ((a, "yes"), (b, "no")) if ref.color]
    if form == "size" and a.color and a.shape:
        return [_exists(a, "yes")]
    return []
