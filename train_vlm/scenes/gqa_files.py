"""Questions in the official GQA files: all and balanced questions, choices, scene graphs.

Answerable questions only, as in GQA. What a question's truth implies for others (a red star: "Is there a red star?" yes) is written as
further, unbalanced questions that the first one entails; they stand in the file of all questions alone.
"""

import json
import random

from train_vlm.scenes.build import Picture
from train_vlm.scenes.captions import PLACES, place_of
from train_vlm.scenes.entailment import implied
from train_vlm.scenes.forms import WORDINGS, say
from train_vlm.scenes.gqa_programs import describe
from train_vlm.scenes.questions import Question
from train_vlm.scenes.scene import Scene

__all__ = ["gqa_files", "scene_graph"]

ENTAILED_SHARE = 0.4  # of the balanced questions that get a further question made for them


def gqa_files(pictures: list[Picture]) -> dict[str, str]:
    """{file name: content} of the four official files and kinds.json ({question id: kind})."""
    rows, choices, graphs, kinds = {}, {}, {}, {}
    for picture in pictures:
        graphs[str(picture.number)] = scene_graph(picture.scene, picture.number)
        for question_id, question, entailed, is_balanced in _with_entailed(picture):
            rows[question_id], choices[question_id] = describe(question, picture.scene, picture.number)
            rows[question_id] |= {"isBalanced": is_balanced, "entailed": entailed, "equivalent": [question_id]}
            kinds[question_id] = question.kind
    balanced = {question_id: row for question_id, row in rows.items() if row["isBalanced"]}
    return {
        "val_all_questions.json": json.dumps(rows),
        "val_balanced_questions.json": json.dumps(balanced),
        "val_choices.json": json.dumps(choices),
        "val_sceneGraphs.json": json.dumps(graphs),
        "kinds.json": json.dumps(kinds),
    }


def _with_entailed(picture: Picture) -> list[tuple[str, Question, list[str], bool]]:
    """(question id, question, ids it entails, is balanced) of the picture's questions and of those made for entailment."""
    rng = random.Random(picture.seed + 4)
    balanced = list(picture.questions)
    made: list[Question] = []
    links: list[list[int]] = []

    def index_of(fact) -> int | None:
        key = (fact.form, fact.a, fact.b, fact.c, fact.p)
        for index, question in enumerate(balanced + made):
            if (question.form, question.a, question.b, question.c, question.p) == key:
                return index
        return None

    for question in balanced:
        facts = implied(question)
        unasked = [fact for fact in facts if index_of(fact) is None]
        if unasked and rng.random() < ENTAILED_SHARE:
            fact = rng.choice(unasked)
            text = say(fact.form, rng.randrange(len(WORDINGS[fact.form])), fact.a, fact.b, fact.c, fact.p)
            made.append(Question(fact.kind, fact.form, fact.pattern, text, fact.answer, fact.a, fact.b, fact.c, fact.p))
        links.append([index for fact in facts if (index := index_of(fact)) is not None])
    ids = [f"{picture.number}{index:02d}" for index in range(len(balanced) + len(made))]
    links += [[] for _ in made]
    return [
        (ids[index], question, [ids[other] for other in links[index]], index < len(balanced))
        for index, question in enumerate(balanced + made)
    ]


def scene_graph(scene: Scene, number: int) -> dict:
    """GQA's scene graph: boxes in whole px, attributes, and who stands left of, right of, above and below whom."""
    things = [(thing, thing.shape, [thing.size, thing.color]) for thing in scene.objects]
    things += [(printed, name, [printed.text]) for name, printed in (("number", scene.number), ("word", scene.word)) if printed]
    objects = {}
    for index, (thing, name, attributes) in enumerate(things):
        left, top, width, height = thing.box
        x, y = round(left), round(top)
        relations = []
        for other_index, (other, *_) in enumerate(things):
            if other_index != index:
                horizontal = abs(thing.x - other.x) > abs(thing.y - other.y)
                name_of = ("to the left of", "to the right of") if horizontal else ("above", "below")
                is_after = thing.x > other.x if horizontal else thing.y > other.y
                relations.append({"name": name_of[is_after], "object": f"{number}{other_index:02d}"})
        objects[f"{number}{index:02d}"] = {
            "name": name,
            "x": x,
            "y": y,
            "w": round(left + width) - x,
            "h": round(top + height) - y,
            "attributes": attributes,
            "relations": relations,
            "place": PLACES[place_of(scene, thing)],
        }
    return {"width": scene.width, "height": scene.height, "objects": objects}
