"""Training samples from official files: the right picture, the evaluators' own words, the answer most people gave."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from eval_vqa.prompts import PROMPTS, render_prompt
from train_vlm.official_samples import caption_samples, gqa_samples, vizwiz_samples, vqav2_samples
from train_vlm.reading import ShardedSource
from train_vlm.shards import main


def answers(*texts):
    return [{"answer": text, "answer_confidence": "yes"} for text in texts]


VQAV2 = {
    "data_subtype": "train2014",
    "questions": [
        {"question_id": 10, "image_id": 7, "question": "What colour?"},
        {"question_id": 11, "image_id": 8, "question": "How many <image> are there?"},
        {"question_id": 12, "image_id": 7, "question": "Where?"},
        {"question_id": 13, "image_id": 7, "question": "Why?"},
    ],
}
ANNOTATIONS = {
    "annotations": [
        {"question_id": 12, "multiple_choice_answer": "left", "answers": answers("right")},
        {"question_id": 10, "multiple_choice_answer": "red", "answers": answers("blue")},
        {"question_id": 13, "multiple_choice_answer": "unclear", "answers": []},
        {"question_id": 11, "answers": answers("2", "3", "3")},
    ]
}
GQA = {"q1": {"imageId": "n5", "question": "Is it red?", "answer": "yes"}, "q2": {"imageId": "n6", "question": "Who?", "answer": "man"}}
VIZWIZ = [
    {"image": "VizWiz_train_0.jpg", "question": "What is it?", "answers": answers("can", "soup", "soup"), "answerable": 1},
    {"image": "VizWiz_train_1.jpg", "question": "Which?", "answers": answers("unsuitable", "unanswerable"), "answerable": 0},
]
CAPTIONS = {
    "images": [{"id": 1, "file_name": "a.jpg"}, {"id": 2, "file_name": "b.jpg"}],
    "annotations": [{"image_id": 2, "caption": " A dog. "}, {"image_id": 1, "caption": "A cat."}, {"image_id": 2, "caption": "A hound."}],
}


@pytest.fixture
def write(tmp_path):
    def write(name, content):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    return write


def asked(sample):
    """(question, answer) pairs of a sample, the mark of its picture taken off the first."""
    values = [turn["value"] for turn in sample["conversations"]]
    assert [turn["from"] for turn in sample["conversations"]] == ["human", "gpt"] * (len(values) // 2)
    assert values[0].startswith("<image>\n") and not any(value.startswith("<image>") for value in values[1:])
    values[0] = values[0].removeprefix("<image>\n")
    return list(zip(values[::2], values[1::2], strict=True))


def test_questions_of_a_picture_become_one_conversation(write, tmp_path):
    found = vqav2_samples(write("q.json", VQAV2), write("a.json", ANNOTATIONS), tmp_path)
    assert [sample["image"] for sample in found] == ["COCO_train2014_000000000007.jpg", "COCO_train2014_000000000008.jpg"]
    assert [answer for _, answer in asked(found[0])] == ["red", "left", "unclear"]
    assert asked(found[1]) == [(render_prompt(PROMPTS["vqav2"], "How many <image> are there?"), "3")]


def test_long_conversations_are_divided(write, tmp_path):
    found = vqav2_samples(write("q.json", VQAV2), write("a.json", ANNOTATIONS), tmp_path, per_sample=2)
    assert [len(asked(sample)) for sample in found] == [2, 1, 1] and len({sample["id"] for sample in found}) == 3


def test_pictures_are_found_in_the_folder_of_their_split(write, tmp_path):
    (tmp_path / "train2014").mkdir()
    (tmp_path / "images").mkdir()
    assert vqav2_samples(write("q.json", VQAV2), write("a.json", ANNOTATIONS), tmp_path)[0]["image"].startswith("train2014/COCO_train2014_")
    assert gqa_samples(write("g.json", GQA), tmp_path)[0]["image"] == "images/n5.jpg"


def test_questions_are_put_as_the_evaluators_put_them(write, tmp_path):
    """A changed line in a prompt has moved a score by nine points."""
    assert asked(vqav2_samples(write("q.json", VQAV2), write("a.json", ANNOTATIONS), tmp_path)[0])[0] == (
        render_prompt(PROMPTS["vqav2"], "What colour?"), "red",
    )  # fmt: skip
    assert asked(gqa_samples(write("g.json", GQA), tmp_path)[1]) == [(render_prompt(PROMPTS["gqa"], "Who?"), "man")]
    found = vizwiz_samples(write("v.json", VIZWIZ))
    assert asked(found[0]) == [(render_prompt(PROMPTS["vizwiz"], "What is it?"), "soup")]
    assert asked(found[1])[0][1] == "unanswerable"


def test_gqa_in_pieces_is_read_whole(write, tmp_path):
    (tmp_path / "pieces").mkdir()
    for number, (key, row) in enumerate(GQA.items()):
        (tmp_path / "pieces" / f"train_all_questions_{number}.json").write_text(json.dumps({key: row}))
    assert gqa_samples(tmp_path / "pieces", tmp_path) == gqa_samples(write("g.json", GQA), tmp_path)


def test_every_caption_is_a_sample(write):
    found = caption_samples(write("c.json", CAPTIONS))
    assert [(sample["id"], sample["image"], sample["conversations"][1]["value"]) for sample in found] == [
        ("b/0", "b.jpg", "A dog."), ("a/0", "a.jpg", "A cat."), ("b/1", "b.jpg", "A hound."),
    ]  # fmt: skip
    plain = caption_samples(write("l.json", [{"image": "a.jpg", "caption": "A cat."}]))
    assert plain[0]["conversations"] == found[1]["conversations"] and asked(plain[0])[0][0].startswith("Describe")


def without(content, key):
    return {name: value for name, value in content.items() if name != key}


WRONG = [
    ("vqav2", without(VQAV2, "data_subtype"), "an entry has no 'data_subtype'"),
    ("vqav2", VQAV2 | {"questions": []}, "has no list 'questions'"),
    ("vqav2", VQAV2 | {"questions": [*VQAV2["questions"], {"question_id": 99, "image_id": 7, "question": "?"}]},
     "1 questions of .* have no annotation in .*, first 99"),
    ("vqav2", [], "holds list; expected the official VQAv2 file"),
    ("gqa", {"q1": {"imageId": "n5", "question": "?"}}, "an entry has no 'answer'"),
    ("gqa", {}, "holds no questions"),
    ("gqa", {"q1": 3}, "expected GQA's questions by id"),
    ("vizwiz", [without(VIZWIZ[0], "answers")], "a test split cannot be trained on"),
    ("vizwiz", [], "holds no questions"),
    ("vizwiz", {}, "expected VizWiz' list"),
    ("captions", CAPTIONS | {"images": CAPTIONS["images"][:1]}, "a caption is of image 2, which is not among its images"),
    ("captions", {"images": CAPTIONS["images"]}, "has no list 'annotations'"),
    ("captions", [], "holds no captions"),
    ("captions", ["a.jpg"], "expected a list of {'image', 'caption'}"),
    ("captions", "{", "is no valid JSON"),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "content", "message"), WRONG)
def test_another_layout_is_one_clear_line(write, tmp_path, capsys, kind, content, message):
    """Through the command: exit code 2, the file's name, no traceback."""
    file = write("wrong.json", content)
    more = ["--annotations", str(write("a.json", ANNOTATIONS))] if kind == "vqav2" else []
    arguments = ["convert", f"--{kind}", str(file), "--images", str(tmp_path), "--model", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*arguments, *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("shards: ") and error.count("\n") == 1 and "wrong.json" in error

    assert re.search(message, error), error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--vqav2", "q.json", "--images", "."], "--vqav2 and --annotations belong together"),
        (["--gqa", "q.json"], "--gqa needs --images"),
        (["--vizwiz", "q.json", "--images", ".", "--annotations", "a.json"], "belong together"),
        (["--gqa", "q.json", "--images", "."], "no file at q.json"),
        (["--gqa", "q.json", "--images", ".", "--questions-per-sample", "0"], "expected at least 2, 1 and 1"),
    ],
)
def test_options_that_do_not_fit_are_one_clear_line(tmp_path, capsys, arguments, message):
    assert main(["convert", *arguments, "--model", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err


def test_official_files_become_shards(write, tmp_path, tiny_folder, capsys):
    """Every kind through the command to samples that a run reads."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    for name in ("COCO_train2014_000000000007", "COCO_train2014_000000000008", "n5", "n6", "VizWiz_train_0", "VizWiz_train_1", "a", "b"):
        picture.save(tmp_path / f"{name}.jpg")
    files = {"vqav2": VQAV2, "gqa": GQA, "vizwiz": VIZWIZ, "captions": CAPTIONS}
    write("a.json", ANNOTATIONS)
    for kind, content in files.items():
        arguments = ["convert", f"--{kind}", str(write(f"{kind}.json", content)), "--images", str(tmp_path), "--model", str(tiny_folder)]
        arguments += ["--out", str(tmp_path / kind)] + (["--annotations", str(tmp_path / "a.json")] if kind == "vqav2" else [])
        assert main(arguments) == 0, capsys.readouterr().err
        source = ShardedSource(tmp_path / kind)
        _, messages = source.read(0)
        assert messages[0]["content"][0]["image"].size == (64, 64) and messages[0]["role"] == "user"
        source.close()


def test_a_missing_caption_is_no_word(tmp_path):
    """A null in a list from the web was the caption "None"."""
    path = tmp_path / "captions.json"
    path.write_text(json.dumps([{"image": "a.png", "caption": None}, {"image": "a.png", "caption": " a red ball "}]))
    assert [sample["conversations"][1]["value"] for sample in caption_samples(path)] == ["", "a red ball"]
