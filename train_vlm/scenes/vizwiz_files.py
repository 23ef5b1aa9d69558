"""Questions in the official VizWiz file (val.json): one per picture, ten answers that disagree, answerable or not."""

import json
import random

from train_vlm.scenes.build import Picture
from train_vlm.scenes.dissent import people_vizwiz
from train_vlm.scenes.forms import UNANSWERABLE

__all__ = ["vizwiz_files"]


def vizwiz_files(pictures: list[Picture]) -> dict[str, str]:
    """{file name: content} of val.json and kinds.json ({image: kind})."""
    rows, kinds = [], {}
    for picture in pictures:
        rng = random.Random(picture.seed + 3)
        question = picture.questions[0]
        image = picture.path.rsplit("/", 1)[-1]
        kinds[image] = question.kind
        rows.append(
            {
                "image": image,
                "question": question.text,
                "answers": [
                    {"answer": answer, "answer_confidence": rng.choices(("yes", "maybe", "no"), (75, 19, 6))[0]}
                    for answer in people_vizwiz(question, rng)
                ],
                "answer_type": question.answer_type if question.is_answerable else UNANSWERABLE,
                "answerable": int(question.is_answerable),
            }
        )
    return {"val.json": json.dumps(rows), "kinds.json": json.dumps(kinds)}
