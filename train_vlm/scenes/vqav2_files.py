"""Questions and annotations in the official VQAv2 files (v2_OpenEnded_..._questions.json, v2_..._annotations.json)."""

import json
import random

from train_vlm.scenes.build import Picture
from train_vlm.scenes.dissent import people_vqav2

__all__ = ["vqav2_files"]

INFO = {
    "description": "Drawn scenes in the format of VQA v2.0.",
    "url": "",
    "version": "2.0",
    "year": 2025,
    "contributor": "",
    "date_created": "",
}
LICENSE = {"name": "Apache-2.0", "url": "https://www.apache.org/licenses/LICENSE-2.0"}


def vqav2_files(pictures: list[Picture], subset: str) -> dict[str, str]:
    """{file name: content} for `subset` "val2014" or "train2014", with kinds.json {question_id: kind}.
    A picture's number is its image_id; a question_id is image_id * 1000 + k."""
    asked, annotations, kinds = [], [], {}
    for picture in pictures:
        rng = random.Random(picture.seed + 2)
        for k, question in enumerate(picture.questions):
            question_id = picture.number * 1000 + k
            kinds[question_id] = question.kind
            asked.append({"image_id": picture.number, "question": question.text, "question_id": question_id})
            answers = [
                {"answer": answer, "answer_confidence": rng.choices(("yes", "maybe", "no"), (85, 12, 3))[0], "answer_id": person}
                for person, answer in enumerate(people_vqav2(question, rng), 1)
            ]
            annotations.append(
                {
                    "question_type": question.question_type,
                    "multiple_choice_answer": question.answer,
                    "answers": answers,
                    "image_id": picture.number,
                    "answer_type": question.answer_type,
                    "question_id": question_id,
                }
            )
    head = {"info": INFO, "license": LICENSE, "data_type": "mscoco", "data_subtype": subset}
    return {
        f"v2_OpenEnded_mscoco_{subset}_questions.json": json.dumps({**head, "task_type": "Open-Ended", "questions": asked}),
        f"v2_mscoco_{subset}_annotations.json": json.dumps({**head, "annotations": annotations}),
        "kinds.json": json.dumps(kinds),
    }
