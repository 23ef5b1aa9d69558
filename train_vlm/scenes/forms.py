"""The forms of question and their wordings: the only place that knows how a question is put.

A form is one sentence pattern with two or three wordings; which wording is taken is drawn apart from the answer, and a question about
something that is not there is put in the very same words. So the text alone tells nothing but the prior of its form.
"""

from typing import NamedTuple

__all__ = ["KINDS", "UNANSWERABLE", "WORDINGS", "Ref", "article", "plural", "say"]

KINDS = (
    "presence",
    "easy",
    "easy_two",
    "color",
    "shape",
    "size",
    "count",
    "place",
    "comparison",
    "number",
    "word",
    "logic",
    "region",
    "unanswerable",
    "unprinted",
)  # easy, easy_two: in training only (easy_candidates.py); unanswerable: no such object; unprinted: no such number or word
UNANSWERABLE = "unanswerable"


class Ref(NamedTuple):
    """A description of objects: what is None is left open. `shape` may be "number" or "word" for what is printed."""

    shape: str | None = None
    color: str | None = None
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(word for word in (self.size, self.color, self.shape or "object") if word)


# {a} {b}: descriptions; {A} {B} with article; {AS} {BS} plural; {c}: colour; {p}: place.
WORDINGS: dict[str, tuple[str, ...]] = {
    "exist": ("Is there {A}?", "Can you see {A}?"),
    "is_color": ("Is the {a} {c}?",),
    "color": ("What color is the {a}?", "What is the color of the {a}?"),
    "shape": ("What shape is the {a}?", "What is the shape of the {a}?"),
    "size": ("Is the {a} small or large?", "What size is the {a}?", "What is the size of the {a}?"),
    "count": ("How many {AS} are there?", "How many {AS} can you see?"),
    "count_all": ("How many shapes are there?", "How many shapes can you see?"),
    "left_right": ("Is the {a} left or right of the {b}?", "Where is the {a}, left or right of the {b}?"),
    "above_below": ("Is the {a} above or below the {b}?", "Where is the {a}, above or below the {b}?"),
    "larger": ("Which is larger, the {a} or the {b}?", "Which is bigger, the {a} or the {b}?"),
    "smaller": ("Which is smaller, the {a} or the {b}?",),
    "is_larger": ("Is the {a} larger than the {b}?", "Is the {a} bigger than the {b}?"),
    "more": ("Are there more {AS} than {BS}?",),
    "same_color": ("Are the {a} and the {b} the same color?",),
    "number": ("What number is shown?", "What is the number?", "Which number is printed?"),
    "word": ("What word is shown?", "What does the word say?", "Which word is printed?"),
    "and": ("Is there {A} and {B}?",),
    "or": ("Is there {A} or {B}?",),
    "but_no": ("Is there {A} but no {b}?",),
    "region_shape": ("What shape is at the {p}?",),
    "region_color": ("What color is the object at the {p}?",),
}


def article(ref: Ref) -> str:
    """The description with "a" or "an"."""
    text = str(ref)
    return f"an {text}" if text[0] in "aeiou" else f"a {text}"


def plural(ref: Ref) -> str:
    """The description of several: "red circles", "crosses"; shapes of any kind are "shapes"."""
    noun = {"cross": "crosses", None: "shapes"}.get(ref.shape, f"{ref.shape}s")
    return " ".join(word for word in (ref.size, ref.color, noun) if word)


def say(form: str, wording: int, a: Ref | None = None, b: Ref | None = None, c: str | None = None, p: str | None = None) -> str:
    """The sentence: `wording` is an index into the form's wordings."""
    words = {"c": c, "p": p}
    for name, ref in (("a", a), ("b", b)):
        if ref is not None:
            words |= {name: str(ref), name.upper(): article(ref), name.upper() + "S": plural(ref)}
    return WORDINGS[form][wording].format(**words)
