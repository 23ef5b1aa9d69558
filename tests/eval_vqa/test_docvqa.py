"""ANLS: the edit distance against a slow recursion, its threshold and its forgiveness."""

import random
from functools import cache

import pytest

from eval_vqa import docvqa


def slow_distance(one, other):
    """The definition, word for word."""

    @cache
    def distance(i, j):
        if i == 0 or j == 0:
            return i + j
        return min(distance(i - 1, j) + 1, distance(i, j - 1) + 1, distance(i - 1, j - 1) + (one[i - 1] != other[j - 1]))

    return distance(len(one), len(other))


def test_edit_distance_equals_the_definition():
    rng = random.Random(0)
    for _ in range(200):
        one, other = ("".join(rng.choices("abc ", k=rng.randrange(9))) for _ in range(2))
        assert docvqa.edit_distance(one, other) == slow_distance(one, other)


@pytest.mark.parametrize(
    ("prediction", "answers", "expected"),
    [
        ("hello", ["hello"], 1.0),
        ("HELLO  world", ["Hello World "], 1.0),  # case and runs of white space
        ("helo", ["hello"], 0.8),
        ("ab", ["ax"], 0.5),  # exactly one half is kept, as the official program does
        ("abc", ["axy"], 0.0),
        ("wrong", ["right", "wrung"], 0.8),  # the nearest answer counts
        ("", ["x"], 0.0),
        ("", [""], 1.0),
        ("ab", ["a   "], 0.75),  # a distance counts against the length as written, as in the official program
        ("ab", ["ßb"], 1 - 1 / 3),  # ß in upper case is two letters
    ],
)
def test_similarity(prediction, answers, expected):
    assert docvqa.similarity(prediction, answers) == pytest.approx(expected)


def test_the_score_is_the_mean_in_percent():
    annotations = {"data": [{"questionId": 1, "answers": ["hello"]}, {"questionId": 2, "answers": ["x"]}]}
    results = [{"questionId": 1, "answer": "bad"}, {"questionId": 1, "answer": "helo"}, {"questionId": 2, "answer": "y"}]
    assert docvqa.evaluate(annotations, results) == {"accuracy": pytest.approx(40.0), "evalQA": {1: pytest.approx(80.0), 2: 0.0}}


@pytest.mark.parametrize(("answers", "prediction"), [([], "x"), ("text", "x"), ([3], "x"), (["x"], None)])
def test_what_is_no_answer_is_an_error_that_names_the_question(answers, prediction):
    with pytest.raises(ValueError, match="question 7: "):
        docvqa.evaluate({"data": [{"questionId": 7, "answers": answers}]}, [{"questionId": 7, "answer": prediction}])


@pytest.mark.parametrize("name", ["val_v1.0.json", "val_v1.0_withQT.json"])
def test_both_names_of_the_official_file_are_found(tmp_path, name):
    (tmp_path / name).write_text('{"data": [{"questionId": 1, "question": "q", "image": "documents/a.png"}]}')
    found = docvqa.locate(tmp_path, None)
    assert (found.split, found.questions.name) == ("val", name)
    (row,) = docvqa.read_questions({"data": [{"questionId": 1, "question": "q", "image": "documents/a.png"}]}, found.images)
    assert row.image == tmp_path / "documents" / "a.png"
    with pytest.raises(FileNotFoundError, match="train_v1.0"):
        docvqa.locate(tmp_path, "train")
