"""Dense captions: everything in the picture, in a fixed order, with no filler.

The place comes first and what stands there after it, so that nearly every token after a colon can only be known by looking.
Printed text is in the lower case of the answers: one token per number or word to learn, in captions and questions alike.
"""

from train_vlm.scenes.scene import Print, Scene, SceneObject

__all__ = ["PLACES", "caption", "place_of"]

PLACES = ("top left", "top", "top right", "left", "center", "right", "bottom left", "bottom", "bottom right")


def place_of(scene: Scene, thing: SceneObject | Print) -> int:
    """Index into `PLACES` of the cell of the 3x3 grid over the picture that holds the centre of `thing`."""
    column, row = min(2, int(3 * thing.x / scene.width)), min(2, int(3 * thing.y / scene.height))
    return 3 * row + column


def caption(scene: Scene) -> str:
    """All things by place, row by row and left to right: "top left: small red circle. center: number 7. right: word cat."."""
    things = []
    for thing in scene.objects:
        things.append((place_of(scene, thing), thing.x, thing.y, f"{thing.size} {thing.color} {thing.shape}"))
    for name, printed in (("number", scene.number), ("word", scene.word)):
        if printed:
            things.append((place_of(scene, printed), printed.x, printed.y, f"{name} {printed.text}"))
    return " ".join(f"{PLACES[place]}: {text}." for place, _, _, text in sorted(things))
