"""Dense captions: everything in the picture, in a fixed order, with no filler.

The place comes first and what stands there after it, so that nearly every token after a colon can only be known by looking.
Printed text is in the lower case of the answers: one token per number or word to learn, in captions and questions alike.
"""

from train_vlm.scenes.scene import COLORS, Print, Scene, SceneObject

__all__ = ["PLACES", "caption", "caption_by_color", "place_of"]

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")


def place_of(scene: Scene, thing: SceneObject | Print) -> int:
    """Index into `PLACES` of the cell of the 3x3 grid over the picture that holds the centre of `thing`."""
    column, row = min(2, int(3 * thing.x / scene.width)), min(2, int(3 * thing.y / scene.height))
    return 3 * row + column


def caption(scene: Scene) -> str:
    """All things by place, row by row and left to right: "top left: small red circle. center: number 7. right: word cat."."""
    things = [(*_order(scene, thing), f"{thing.size} {thing.color} {thing.shape}") for thing in scene.objects]
    things += [(*_order(scene, printed), f"{name} {printed.text}") for name, printed in _prints(scene)]
    return " ".join(f"{PLACES[place]}: {text}." for place, _, _, text in sorted(things))


def caption_by_color(scene: Scene) -> str:
    """All things by colour, in the order of `COLORS`, what is printed last: "red: small circle top left. number: 7 center.".

    After a caption by place nothing had ever to be found by its colour, and questions that name a colour stayed unanswered for
    thousands of steps, while those that name a shape were learnt in a hundred (docs/decisions.md)."""
    objects = sorted(scene.objects, key=lambda thing: (COLORS.index(thing.color), _order(scene, thing)))
    said = [f"{thing.color}: {thing.size} {thing.shape} {PLACES[place_of(scene, thing)]}." for thing in objects]
    said += [f"{name}: {printed.text} {PLACES[place_of(scene, printed)]}." for name, printed in _prints(scene)]
    return " ".join(said)


def _order(scene: Scene, thing: SceneObject | Print) -> tuple[int, float, float]:
    return place_of(scene, thing), thing.x, thing.y


def _prints(scene: Scene) -> list[tuple[str, Print]]:
    return [(name, printed) for name, printed in (("number", scene.number), ("word", scene.word)) if printed]
