"""All that can be asked about a scene, with the true answer.

One function per kind. Negatives are hard: what is asked for in vain is put together from colours and shapes that are in the picture,
each apart, wherever it has them. Where something could be argued about (two stars, an object between two places, neither left nor
right) nothing is asked.
"""

from collections import Counter
from itertools import permutations

from train_vlm.scenes.captions import PLACES, place_of
from train_vlm.scenes.easy_candidates import MOST_ABSENT, easy_candidates, easy_two_candidates
from train_vlm.scenes.forms import UNANSWERABLE, Ref
from train_vlm.scenes.scene import COLORS, SHAPES, SIZES
from train_vlm.scenes.scene_view import Candidate, SceneView

__all__ = ["candidates"]


def candidates(view: SceneView, kind: str) -> list[Candidate]:
    """Every question of this kind about the scene; made when first asked for, then kept with the view."""
    if kind not in view.asked_for:
        view.asked_for[kind] = CANDIDATES[kind](view)
    return view.asked_for[kind]


def _presence(view: SceneView) -> list[Candidate]:
    found = []
    for color, shape in view.pairs:
        ref = Ref(shape, color)
        found.append(Candidate("presence", "exist", "yes", "pair", ref, topics=view.looks(ref)))
    found += [Candidate("presence", "exist", "no", "pair", ref, topics=(("exist", ref),)) for ref in view.absent("pair")]
    for index, ref in view.unique("shape"):
        color = view.objects[index].color
        others = [other for other in view.colors if other != color] or [other for other in COLORS if other != color]
        for asked in [color, *others]:
            answer = "yes" if asked == color else "no"
            found.append(Candidate("presence", "is_color", answer, "shape", ref, c=asked, topics=(("look", index),)))
    return found


def _color(view: SceneView) -> list[Candidate]:
    return [Candidate("color", "color", view.objects[i].color, "shape", ref, topics=(("look", i),)) for i, ref in view.unique("shape")]


def _shape(view: SceneView) -> list[Candidate]:
    return [Candidate("shape", "shape", view.objects[i].shape, "color", ref, topics=(("look", i),)) for i, ref in view.unique("color")]


def _size(view: SceneView) -> list[Candidate]:
    found = []
    for pattern in ("shape", "color", "pair"):
        for i, ref in view.unique(pattern):
            topics = (("size", i), ("look", i)) if pattern == "pair" else (("size", i),)
            found.append(Candidate("size", "size", view.objects[i].size, pattern, ref, topics=topics))
    return found


def _count(view: SceneView) -> list[Candidate]:
    sizes = Counter(thing.size for thing in view.objects)
    found = [Candidate("count", "count_all", str(len(view.objects)), topics=(("count", None),))]
    for pattern, values, counts in (("shape", SHAPES, view.shapes), ("color", COLORS, view.colors), ("size", SIZES, sizes)):
        for value in values:
            ref = Ref(**{pattern: value})
            found.append(Candidate("count", "count", str(counts[value]), pattern, ref, topics=(("count", value),)))
    return found


def _apart(first, second, axis: int) -> int:
    """-1 when `first` stands clearly left of (axis 0) or above (axis 1) `second`, +1 for the other way, 0 when it is not clear."""
    difference = (first.x, first.y)[axis] - (second.x, second.y)[axis]
    reach = (first.box[2 + axis] + second.box[2 + axis]) / 2
    return 0 if abs(difference) < max(9.0, 0.8 * reach) else 1 if difference > 0 else -1


DIRECTIONS = (("left_right", ("left", "right")), ("above_below", ("above", "below")))


def _place(view: SceneView) -> list[Candidate]:
    found = []
    prints = [(name, Ref(name)) for name, printed in view.print_of.items() if printed]

    def things(key):
        return view.print_of[key] if isinstance(key, str) else view.objects[key]

    for pattern, named in (("shape", view.unique("shape")), ("color", view.unique("color")), ("print", view.unique("shape") + prints)):
        for (key_a, a), (key_b, b) in permutations(named, 2):
            if pattern == "print" and isinstance(key_a, int) and isinstance(key_b, int):
                continue
            for axis, (form, answers) in enumerate(DIRECTIONS):
                side = _apart(things(key_a), things(key_b), axis)
                if side:
                    topics = ((form, frozenset((key_a, key_b))),)
                    found.append(Candidate("place", form, answers[side > 0], pattern, a, b, topics=topics))
    return found


def _comparison(view: SceneView) -> list[Candidate]:
    found = []
    for (i, a), (j, b) in permutations(view.unique("shape"), 2):
        first, second = view.objects[i], view.objects[j]
        topics = (("compare", frozenset((i, j))),)
        larger = first.size == "large" and second.size == "small"
        if first.size != second.size:
            big, little = (a, b) if larger else (b, a)
            # which of the two comes first is balanced (pattern), the shape that wins is balanced as the answer
            found.append(Candidate("comparison", "larger", str(big), "first" if larger else "second", a, b, topics=topics))
            found.append(Candidate("comparison", "smaller", str(little), "second" if larger else "first", a, b, topics=topics))
        if larger or first.diameter <= second.diameter:  # not between two of one size of which the first is a little larger
            found.append(Candidate("comparison", "is_larger", "yes" if larger else "no", "shape", a, b, topics=topics))
        answer = "yes" if first.color == second.color else "no"
        found.append(Candidate("comparison", "same_color", answer, "shape", a, b, topics=(("color", frozenset((i, j))),)))
    for a, b in permutations(SHAPES, 2):
        if view.shapes[a] and view.shapes[b]:
            answer = "yes" if view.shapes[a] > view.shapes[b] else "no"
            found.append(Candidate("comparison", "more", answer, "shape", Ref(a), Ref(b), topics=(("more", frozenset((a, b))),)))
    return found


def _number(view: SceneView) -> list[Candidate]:
    return [Candidate("number", "number", view.scene.number.text, topics=("number",))] if view.scene.number else []


def _word(view: SceneView) -> list[Candidate]:
    return [Candidate("word", "word", view.scene.word.text, topics=("word",))] if view.scene.word else []


def _logic(view: SceneView) -> list[Candidate]:
    found = []
    for pattern in ("shape", "pair"):
        here, gone = view.present(pattern), view.absent(pattern)[:MOST_ABSENT]
        for truth, ands in (
            ((True, True), permutations(here, 2)),
            ((True, False), ((a, b) for a in here for b in gone)),
            ((False, True), ((a, b) for a in gone for b in here)),
            ((False, False), permutations(gone, 2)),
        ):
            pairs = list(ands)
            for form, holds in (("and", all(truth)), ("or", any(truth)), ("but_no", truth[0] and not truth[1])):
                if form == "and" and not any(truth):
                    continue  # too easy a "no"
                answer = "yes" if holds else "no"
                for a, b in pairs:
                    topics = (("logic", form), *view.looks(a), *view.looks(b))
                    found.append(Candidate("logic", form, answer, pattern, a, b, topics=topics))
    return found


# "At the left" may also mean the whole left third: such a question is asked only where both readings agree.
SIDES = {1: (0, 1, 2), 3: (0, 3, 6), 5: (2, 5, 8), 7: (6, 7, 8)}


def _cell(view: SceneView, place: int) -> list[int] | None:
    """Indexes of the objects in a cell of the 3x3 grid; None when something lies across its border or too near to it, or, for the middle
    of a side, elsewhere along that side."""
    width, height = view.scene.width / 3, view.scene.height / 3
    left, top = place % 3 * width, place // 3 * height
    inside = []
    for index, thing in enumerate(view.objects):
        found = place_of(view.scene, thing)
        is_here = found == place
        if not is_here and found in SIDES.get(place, ()):
            return None
        x, y, w, h = thing.box
        overlap = max(0, min(x + w, left + width) - max(x, left)) * max(0, min(y + h, top + height) - max(y, top)) / (w * h)
        if not is_here and overlap > 0.2 or is_here and overlap < 0.6:
            return None
        if is_here:
            inside.append(index)
    return inside


def _region(view: SceneView) -> list[Candidate]:
    found = []
    for place, name in enumerate(PLACES):
        inside = _cell(view, place)
        if inside is not None and len(inside) == 1:
            thing = view.objects[inside[0]]
            topics = (("at", place),)
            found.append(Candidate("region", "region_shape", thing.shape, "place", p=name, topics=topics))
            found.append(Candidate("region", "region_color", thing.color, "place", p=name, topics=topics))
    return found


def _unanswerable(view: SceneView) -> list[Candidate]:
    kind = "unanswerable"
    found = [Candidate(kind, "color", UNANSWERABLE, "shape", ref) for ref in view.absent("shape")]
    found += [Candidate(kind, "shape", UNANSWERABLE, "color", ref) for ref in view.absent("color")]
    for pattern in ("shape", "color", "pair"):
        found += [Candidate(kind, "size", UNANSWERABLE, pattern, ref) for ref in view.absent(pattern)]
    for pattern in ("shape", "color"):
        for _, here in view.unique(pattern):
            for gone in view.absent(pattern):
                for form, _ in DIRECTIONS:
                    found.append(Candidate(kind, form, UNANSWERABLE, pattern, here, gone))
                    found.append(Candidate(kind, form, UNANSWERABLE, pattern, gone, here))
    for place, name in enumerate(PLACES):
        if _cell(view, place) == []:
            found.append(Candidate(kind, "region_shape", UNANSWERABLE, "place", p=name))
            found.append(Candidate(kind, "region_color", UNANSWERABLE, "place", p=name))
    return found


def _unprinted(view: SceneView) -> list[Candidate]:
    found = []
    for name, printed in view.print_of.items():
        if printed:
            continue
        found.append(Candidate("unprinted", name, UNANSWERABLE, topics=(name,)))
        for _, here in view.unique("shape"):
            for form, _ in DIRECTIONS:
                for a, b in ((here, Ref(name)), (Ref(name), here)):
                    found.append(Candidate("unprinted", form, UNANSWERABLE, "print", a, b, topics=(name,)))
    return found


CANDIDATES = {
    "presence": _presence,
    "easy": easy_candidates,
    "easy_two": easy_two_candidates,
    "color": _color,
    "shape": _shape,
    "size": _size,
    "count": _count,
    "place": _place,
    "comparison": _comparison,
    "number": _number,
    "word": _word,
    "logic": _logic,
    "region": _region,
    "unanswerable": _unanswerable,
    "unprinted": _unprinted,
}
