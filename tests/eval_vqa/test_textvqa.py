"""TextVQA's own normaliser and its soft accuracy."""

import pytest

from eval_vqa import textvqa, vqav2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1,000-2", "1000 2"),  # VQAv2's official program: 10002
        ("red, blue?", "red blue"),
        ("the dog's", "dog 's"),
        ("She's", "she 's"),
        ("ten", "10"),
        ("dont", "don't"),
        ("u.s.a.", "usa"),
        (" A\tcat\n", "cat"),
        ("t-shirt - red", "tshirt red"),
    ],
)
def test_the_normaliser(text, expected):
    assert textvqa.normalize_answer(text) == expected


def test_it_differs_from_vqav2_where_a_comma_stands_between_digits():
    assert vqav2.normalize_answer("1,000-2") == "10002"


def data(answers, key=1):
    return {"data": [{"question_id": key, "answers": answers}]}


def score(answers, prediction):
    return textvqa.evaluate(data(answers), [{"question_id": 1, "answer": prediction}])["accuracy"]


@pytest.mark.parametrize(("matches", "percent"), [(0, 0.0), (1, 30.0), (2, 60.0), (3, 90.0), (4, 100.0), (10, 100.0)])
def test_soft_accuracy(matches, percent):
    assert score(["Cat"] * matches + ["dog"] * (10 - matches), "the cat.") == pytest.approx(percent)


def test_unanimous_answers_are_normalised_too():
    assert score(["Yes."] * 10, "yes") == 100.0


@pytest.mark.parametrize(
    ("answers", "results", "message"),
    [
        (["a"] * 9, [{"question_id": 1, "answer": "a"}], "question 1: expected 10 answers in the annotation, found 9"),
        (["a"] * 10, [{"question_id": 1, "answer": 3}], "question 1: an answer must be a string"),
        (["a"] * 9 + [4], [{"question_id": 1, "answer": "a"}], "question 1: an answer must be a string"),
        (["a"] * 10, [], "without result or annotation, 1: 1"),
        (["a"] * 10, [{"question_id": 1}], "the result has no 'answer'"),
    ],
)
def test_what_cannot_be_scored_is_an_error_that_names_it(answers, results, message):
    with pytest.raises(ValueError, match=message):
        textvqa.evaluate(data(answers), results)


def test_nothing_to_score_is_an_error():
    with pytest.raises(ValueError, match="no question to score"):
        textvqa.evaluate({"data": []}, [])


def test_annotations_are_not_changed():
    """A harness is known to rewrite the answers while it scores."""
    given = data(["The Cat"] * 10)
    textvqa.evaluate(given, [{"question_id": 1, "answer": "cat"}])
    assert given == data(["The Cat"] * 10)


def test_images_of_val_are_in_the_training_folder(tmp_path):
    (tmp_path / "TextVQA_0.5.1_val.json").write_text('{"data": []}')
    (tmp_path / "train_images").mkdir()
    found = textvqa.locate(tmp_path, None)
    (row,) = textvqa.read_questions({"data": [{"question_id": 5, "image_id": "ab", "question": "q"}]}, found.images)
    assert (row.id, row.image) == (5, tmp_path / "train_images" / "ab.jpg")
    with pytest.raises(FileNotFoundError, match="TextVQA_0.5.1_test.json"):
        textvqa.locate(tmp_path, "test")
