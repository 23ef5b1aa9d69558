"""Questions for training alone: the forms that take longest to learn, asked where the answer is easy.

Held-out questions of presence, logic and comparison are hard on purpose: both halves of "a red circle" are in the picture, of "a circle and
a star" at least one is, and "more circles than stars" asks about two shapes that are there. From such questions alone a small model learns
nothing for thousands of steps: the answer hangs on two things it must find at once, and guessing one of them tells it nothing. Here one
thing is enough (docs/decisions.md has what that gives). Each form comes with both answers, so that the text tells nothing.
"""

from itertools import permutations

from train_vlm.scenes.forms import Ref
from train_vlm.scenes.scene import COLORS, SHAPES
from train_vlm.scenes.scene_view import Candidate, SceneView

__all__ = ["MOST_ABSENT", "easy_candidates", "easy_two_candidates"]

MOST_ABSENT = 6  # descriptions that fit nothing, of one kind: there are six shapes, and many more pairs


def easy_candidates(view: SceneView) -> list[Candidate]:
    """Is there a shape, a colour, a pair of which half is nowhere."""
    found = []
    for pattern, refs in (("shape", [Ref(shape) for shape in SHAPES]), ("color", [Ref(None, color) for color in COLORS])):
        for ref in refs:
            here = view.shapes[ref.shape] or view.colors[ref.color]
            found.append(_exists("yes" if here else "no", pattern, ref, (("exist", ref),)))
    for color, shape in view.pairs:
        ref = Ref(shape, color)
        found.append(_exists("yes", "half", ref, view.looks(ref)))
    for ref in (Ref(shape, color) for color, shape in view.half_absent):
        found.append(_exists("no", "half", ref, (("exist", ref),)))
    return found


def easy_two_candidates(view: SceneView) -> list[Candidate]:
    """Two of which both or neither are there; one that is there but not, or more often than, one that is not, and the other way round. Of
    shapes, and with "and" and "but no" also of pairs of colour and shape."""
    kind, found = "easy_two", []
    for pattern in ("shape", "pair"):
        present, absent = view.present(pattern), view.absent(pattern)[:MOST_ABSENT]
        for answer, refs in (("yes", present), ("no", absent)):
            for a, b in permutations(refs, 2):
                found.append(
                    Candidate(kind, "and", answer, f"{pattern}, alike", a, b, topics=(("logic", "and"), *view.looks(a), *view.looks(b)))
                )
        for here in present:
            for gone in absent:
                topics = {"but_no": (("logic", "but_no"), *view.looks(here))}
                if pattern == "shape":
                    topics["more"] = (("more", frozenset((here.shape, gone.shape))),)
                for form, topic in topics.items():
                    found.append(Candidate(kind, form, "yes", f"{pattern}, alone", here, gone, topics=topic))
                    found.append(Candidate(kind, form, "no", f"{pattern}, alone", gone, here, topics=topic))
    return found


def _exists(answer: str, pattern: str, ref: Ref, topics: tuple) -> Candidate:
    return Candidate("easy", "exist", answer, pattern, ref, topics=topics)
