"""Training files in LLaVA's JSON: one list of conversations of captions, two of questions, for the first and the second half of a training.

The prompts are those the evaluators use: VQAv2's and GQA's short-answer line, and for a third of the pictures VizWiz' form, which allows
for "unanswerable" in so many words.
"""

import json

from train_vlm.scenes.build import Picture
from train_vlm.scenes.captions import caption, caption_by_color

__all__ = ["CAPTION_BY_COLOR_PROMPT", "CAPTION_PROMPT", "SHORT_ANSWER", "VIZWIZ_SHORT_ANSWER", "llava_files"]

CAPTION_PROMPT = "Describe the picture."
CAPTION_BY_COLOR_PROMPT = "Describe the picture by color."
SHORT_ANSWER = "Answer the question using a single word or phrase."
VIZWIZ_SHORT_ANSWER = f"When the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT_ANSWER}"


def llava_files(pictures: list[Picture]) -> dict[str, str]:
    """{file name: content} of captions.json, questions.json, late_questions.json and kinds.json ({id: kinds of its questions, in order}).
    `image` is relative to the folder of these files."""
    captions, conversations, late, kinds = [], [], [], {}
    for picture in pictures:
        identity = f"{picture.number:012d}"
        head = {"id": identity, "image": picture.path.removeprefix("train/")}
        is_by_color = picture.number % 3 == 0
        described = (CAPTION_BY_COLOR_PROMPT, caption_by_color(picture.scene)) if is_by_color else (CAPTION_PROMPT, caption(picture.scene))
        captions.append({**head, "conversations": _turns([described])})
        line = VIZWIZ_SHORT_ANSWER if picture.is_vizwiz else SHORT_ANSWER
        asked = [(f"{question.text}\n{line}", question.answer) for question in picture.questions]
        (late if picture.is_late else conversations).append({**head, "conversations": _turns(asked)})
        kinds[identity] = [question.kind for question in picture.questions]
    files = {"captions": captions, "questions": conversations, "late_questions": late, "kinds": kinds}
    return {f"{name}.json": json.dumps(content) for name, content in files.items()}


def _turns(pairs: list[tuple[str, str]]) -> list[dict[str, str]]:
    turns = []
    for index, (human, gpt) in enumerate(pairs):
        turns.append({"from": "human", "value": human if index else f"<image>\n{human}"})
        turns.append({"from": "gpt", "value": gpt})
    return turns
