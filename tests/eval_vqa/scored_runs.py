"""Two small scored runs of VQAv2 on disk, for what reads finished runs."""

import json

from PIL import Image

from eval_vqa.command_line import main
from eval_vqa.json_files import write_json

HEAD = {"info": {}, "license": {}, "data_type": "mscoco", "data_subtype": "val2014"}
TILES = {"tile_size": 32, "max_tiles": 6, "policy": "closest", "thumbnail": True}


def make_data(folder, count=12, images=4):
    """Questions 0..count-1 about `images` pictures of two tiles; even ones are of type "what" and want "red", odd ones "is the", "no"."""
    rows = [{"question_id": key, "image_id": key % images, "question": f"Question {key}?"} for key in range(count)]
    marks = []
    for row in rows:
        right, kind, answer_type = ("no", "is the", "yes/no") if row["question_id"] % 2 else ("red", "what", "other")
        people = [{"answer": right if place < 9 else "blue", "answer_confidence": "yes", "answer_id": place + 1} for place in range(10)]
        marks.append({**row, "question_type": kind, "answer_type": answer_type, "answers": people, "multiple_choice_answer": right})
    write_json(folder / "v2_OpenEnded_mscoco_val2014_questions.json", {**HEAD, "task_type": "Open-Ended", "questions": rows})
    write_json(folder / "v2_mscoco_val2014_annotations.json", {**HEAD, "annotations": marks})
    for number in range(images):
        path = folder / "val2014" / f"COCO_val2014_{number:012d}.jpg"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 32), (40 * number, 0, 0)).save(path)
    return folder


def make_run(folder, data, wrong=(), **settings):
    """A scored run that answers everything right but `wrong` {id: answer}; settings go into run.json."""
    wrong = dict(wrong)
    rows = []
    for key in range(12):
        answer = wrong.get(key, "no" if key % 2 else "red")
        rows.append({"question_id": key, "answer": answer, "text": answer, "stop_reason": "end", "tiles": 3, "visual_tokens": 6})
    folder.mkdir(parents=True)
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {
        "questions": str(data / "v2_OpenEnded_mscoco_val2014_questions.json"),
        "annotations": str(data / "v2_mscoco_val2014_annotations.json"),
        "images": str(data / "val2014"),
    }
    run = {
        "task": "vqav2", "prompt": "{question}\nShort.", "prompt_sha256": "p", "model": "m", "model_fingerprint": "f", "split": "val2014",
        "preprocessing": {"tiles": TILES, "visual_tokens_per_tile": 2, "sha256": "s"}, "stop_rule": {"max_new_tokens": 16},
        "files": files, "questions_sha256": "q", "counts": {"stop_reasons": {"end": 12}, "tiles": {"3": 12}}, "problems": [],
    } | settings  # fmt: skip
    write_json(folder / "run.json", run)
    assert main("vqav2", ["score", "--predictions", str(folder / "predictions.jsonl"), "--data", str(data)]) == 0
    return folder
