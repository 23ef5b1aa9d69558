"""GQA's grounding score: how much attention falls on the regions a question and its full answer speak of.

Two things are kept as the official program has them. The score is a sum over regions, not a mean, so it may exceed 1. And "the whole
image counts when the question is about the scene" looks for a *key* called scene in a semantic step, which no official file has. One
thing is not: there object attention stops with an error before it is read; here its evident intent is computed.
"""

from eval_vqa.official_records import field

__all__ = ["grounding_score"]


def grounding_score(question: dict, scene: dict, attention: list, map_size: int) -> float:
    """Sum over regions and cells of the cell's weight times the share of the cell inside the region.

    attention: spatial, at least map_size x map_size, attention[i][j] the weight of the cell whose x runs from i / map_size and y from
    j / map_size; or object boxes [[x0, y0, x1, y1, weight], ...] in 0..1. What can be read as a map is a map. Raises ValueError for
    neither, for an object id that is not in the scene graph, and for boxes or images without area. Source: GQA eval.py 1.1.
    """
    marked = field(question, "annotations", "the question")
    pointers = [*field(marked, "question", "its annotations").values(), *field(marked, "fullAnswer", "its annotations").values()]
    regions = [_object_box(scene, pointer) for pointer in pointers]
    if any("scene" in step for step in field(question, "semantic", "the question")):
        regions.append((0.0, 0.0, 1.0, 1.0))
    cells = _cells(attention, map_size)
    score = 0.0
    for region in regions:
        for cell, weight in cells:
            score += weight * (_overlap(cell, region) / _area(cell))  # in the official order of operations
    return score


def _object_box(scene: dict, object_id: str) -> tuple[float, float, float, float]:
    """Corners of an object as shares of the image, not clipped."""
    found = field(field(scene, "objects", "the scene graph"), object_id, "the list of objects")
    x, y, w, h = (field(found, key, f"object {object_id!r}") for key in "xywh")
    width, height = (field(scene, key, "the scene graph") for key in ("width", "height"))
    if not width or not height:
        raise ValueError(f"the scene graph gives the image {width} x {height} pixels")
    return x / width, y / height, (x + w) / width, (y + h) / height


def _cells(attention: list, map_size: int) -> list[tuple[tuple[float, float, float, float], float]]:
    """Boxes with their weights, from a map or from object attention."""
    if not isinstance(attention, list) or not all(isinstance(row, list) for row in attention):
        raise ValueError(f"attention must be a list of lists, found {type(attention).__name__}")
    if len(attention) >= map_size and all(len(row) >= map_size for row in attention[:map_size]):
        edge = 1 / map_size if map_size else 0.0
        return [((edge * i, edge * j, edge * (i + 1), edge * (j + 1)), attention[i][j]) for i in range(map_size) for j in range(map_size)]
    if not attention or any(len(row) != 5 for row in attention):
        lengths = sorted({len(row) for row in attention})
        raise ValueError(
            f"attention must be {map_size} x {map_size} or rows of x0, y0, x1, y1, weight; found {len(attention)} rows of {lengths} numbers"
        )
    boxes = [((x0, y0, x1, y1), weight) for x0, y0, x1, y1, weight in attention]
    if flat := [box for box, _ in boxes if box[2] <= box[0] or box[3] <= box[1]]:
        raise ValueError(f"an attention box must have x0 < x1 and y0 < y1, found {flat[0]} (is map_size={map_size} the size of the map?)")
    return boxes


def _overlap(one, other) -> float:
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return width * height if width > 0 and height > 0 else 0.0


def _area(box) -> float:
    return (box[2] - box[0]) * (box[3] - box[1])
