"""A scene as those see it who ask about it: look-ups over its objects, and what a question that could be asked consists of."""

from collections import Counter
from dataclasses import dataclass

from train_vlm.scenes.forms import Ref
from train_vlm.scenes.scene import COLORS, SHAPES, Scene

__all__ = ["Candidate", "SceneView"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A question that could be asked. `pattern` says what its descriptions are made of: priors are balanced per form and pattern.
    `topics`: what it gives away; two questions about one picture never share a topic."""

    kind: str
    form: str
    answer: str
    pattern: str = ""
    a: Ref | None = None
    b: Ref | None = None
    c: str | None = None
    p: str | None = None
    topics: tuple = ()


class SceneView:
    """A scene with the look-ups that the questions need; `asked_for` {kind: candidates} is filled by candidates.py."""

    def __init__(self, scene: Scene):
        self.scene = scene
        self.objects = scene.objects
        self.shapes = Counter(thing.shape for thing in scene.objects)
        self.colors = Counter(thing.color for thing in scene.objects)
        self.pairs = Counter((thing.color, thing.shape) for thing in scene.objects)
        self.absent_shapes = [shape for shape in SHAPES if shape not in self.shapes]
        self.absent_colors = [color for color in COLORS if color not in self.colors]
        present = [(color, shape) for color in self.colors for shape in self.shapes if (color, shape) not in self.pairs]
        self.half_absent = [(color, shape) for color in self.colors for shape in self.absent_shapes]
        self.half_absent += [(color, shape) for color in self.absent_colors for shape in self.shapes]
        self.absent_pairs = present or self.half_absent  # the hardest there are
        self.print_of = {"number": scene.number, "word": scene.word}
        self.asked_for: dict[str, list[Candidate]] = {}

    def unique(self, pattern: str) -> list[tuple[int, Ref]]:
        """(index, description) of every object that a description of this pattern (shape, color, pair) singles out."""
        found = []
        for index, thing in enumerate(self.objects):
            if pattern == "shape" and self.shapes[thing.shape] == 1:
                found.append((index, Ref(thing.shape)))
            elif pattern == "color" and self.colors[thing.color] == 1:
                found.append((index, Ref(None, thing.color)))
            elif pattern == "pair" and self.pairs[thing.color, thing.shape] == 1:
                found.append((index, Ref(thing.shape, thing.color)))
        return found

    def looks(self, ref: Ref) -> tuple:
        """The topics of a question that names colour and shape of objects: it would answer what colour or shape they have. Of one that
        names a shape alone there are none."""
        return tuple(("look", i) for i, thing in enumerate(self.objects) if (thing.shape, thing.color) == (ref.shape, ref.color))

    def present(self, pattern: str) -> list[Ref]:
        """Descriptions of this pattern, shape or pair, that fit something."""
        return [Ref(shape) for shape in self.shapes] if pattern == "shape" else [Ref(shape, color) for color, shape in self.pairs]

    def absent(self, pattern: str) -> list[Ref]:
        """Descriptions of this pattern that fit nothing."""
        if pattern == "shape":
            return [Ref(shape) for shape in self.absent_shapes]
        if pattern == "color":
            return [Ref(None, color) for color in self.absent_colors]
        return [Ref(shape, color) for color, shape in self.absent_pairs]
