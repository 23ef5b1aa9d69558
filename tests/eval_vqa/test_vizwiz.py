"""VizWiz's accuracy and answerability."""

import copy

import pytest

from eval_vqa import vizwiz


def annotation(image, answers, answer_type="other", answerable=1):
    return {"image": image, "question": "what?", "answers": [{"answer": answer, "answer_confidence": "yes"} for answer in answers],
            "answer_type": answer_type, "answerable": answerable}  # fmt: skip


def score(answers, prediction, **options):
    return vizwiz.evaluate([annotation("i", answers)], [{"image": "i", "answer": prediction}], **options)["accuracy"]


def test_equal_answers_are_left_out_one_at_a_time():
    assert score(["cat"] * 10, "cat") == 100.0
    assert score(["cat"] + ["dog"] * 9, "cat") == 30.0


def test_the_prediction_is_always_normalised_and_the_answers_never():
    assert score(["yes"] * 10, "The Yes.") == 100.0
    assert score(["Yes"] * 10, "Yes") == 0.0
    assert score(["yes "] * 10, "yes ") == 0.0


def test_a_repaired_contraction_has_a_curly_apostrophe():
    assert score(["don't"] * 10, "dont") == 0.0
    assert score(["don\u2019t"] * 10, "dont") == 100.0


def test_unanswerable_is_an_answer_like_any_other():
    assert score(["unanswerable"] * 2 + ["cat"] * 8, "Unanswerable") == 60.0


def test_tables():
    rows = [annotation("a", ["cat"] * 10), annotation("b", ["cat"] + ["x"] * 9, "number"), annotation("c", ["x"] * 10, "number")]
    assert vizwiz.evaluate(rows, [{"image": image, "answer": "cat"} for image in "abcz"]) == {
        "accuracy": 43.33, "perAnswerType": {"other": 100.0, "number": 15.0}, "evalQA": {"a": 100.0, "b": 30.0, "c": 0.0},
        "evalAnsType": {"other": {"a": 100.0}, "number": {"b": 30.0, "c": 0.0}},
    }  # fmt: skip


def test_duplicates_count_once_and_the_last_wins():
    rows = [annotation("a", ["cat"] * 10), annotation("b", ["cat"] * 10), annotation("a", ["dog"] * 10)]
    results = [{"image": "a", "answer": 3}, {"image": "a", "answer": "dog"}, {"image": "b", "answer": "x"}]
    assert vizwiz.evaluate(rows, results)["accuracy"] == 50.0


def test_a_subset_with_repeats_counts_them():
    rows = [annotation(image, ["cat"] * 10) for image in "abc"]
    results = [{"image": "a", "answer": "cat"}, {"image": "b", "answer": "x"}]  # c is neither answered nor asked for
    assert vizwiz.evaluate(rows, results, images=["a", "b", "a"])["accuracy"] == 66.67


def test_nothing_that_was_given_is_changed():
    given = ([annotation("a", ["The Cat\n"] * 10)], [{"image": "a", "answer": " The\tcat. "}])
    before = copy.deepcopy(given)
    vizwiz.evaluate(*given)
    assert given == before


@pytest.mark.parametrize(
    ("rows", "results", "message"),
    [
        ([annotation("a", ["x"])], [], "without result, 1: 'a'"),
        ([annotation("a", ["x"])], [{"image": "a", "answer": None}], "image 'a': an answer must be a string"),
        ([annotation("a", ["x"])], [{"image": "a"}], "image 'a': the result has no 'answer'"),
        ([annotation("a", [])], [{"image": "a", "answer": "x"}], "image 'a': expected a list of human answers"),
        ([{"image": "a", "question": "q"}], [{"image": "a", "answer": "x"}], "image 'a': the annotation has no 'answers'"),
        ([{"image": "a", "answers": [{"answer": "x"}]}], [{"image": "a", "answer": "x"}], "image 'a': the annotation has no 'answer_type'"),
        ([], [], "no image to score"),
        ([annotation("a", ["x"])], {"a": "x"}, "results must be a JSON list"),
        ([annotation("a", ["x"])], [{"answer": "x"}], "entry 0 of results has no 'image'"),
    ],
)
def test_what_the_official_program_fails_on_is_an_error_that_names_it(rows, results, message):
    with pytest.raises(ValueError, match=message):
        vizwiz.evaluate(rows, results)


def test_an_unknown_image_in_the_subset_is_named():
    with pytest.raises(ValueError, match="images without annotation, 1: 'z'"):
        vizwiz.evaluate([annotation("a", ["x"])], [{"image": "a", "answer": "x"}], images=["z"])


def answerability(labels, confidences):
    rows = [annotation(str(place), [], answerable=label) for place, label in enumerate(labels)]
    return vizwiz.evaluate_answerability(rows, [{"image": str(place), "answerable": value} for place, value in enumerate(confidences)])


def test_unanswerable_is_the_positive_class():
    assert answerability([0, 1], [0.1, 0.9]) == {"average_precision": 100.0, "f1_score": 100.0}
    assert answerability([0, 1], [0.9, 0.1]) == {"average_precision": 50.0, "f1_score": 0.0}


def test_confidences_closer_than_a_double_can_tell_from_one_are_ties():
    assert answerability([0, 1, 1, 1], [1e-17, 0.0, 1e-18, 1e-17])["average_precision"] == 25.0


def test_extra_images_in_the_results_are_ignored():
    rows = [annotation("a", [], answerable=0)]
    results = [{"image": "a", "answerable": 0.1}, {"image": "z", "answerable": 0.9}]
    assert vizwiz.evaluate_answerability(rows, results) == {"average_precision": 100.0, "f1_score": 100.0}


def test_a_missing_label_is_named():
    with pytest.raises(ValueError, match="annotation of image 'a' has no 'answerable'"):
        vizwiz.evaluate_answerability([{"image": "a"}], [{"image": "a", "answerable": 1.0}])


def test_a_confidence_of_one_half_counts_as_answerable():
    assert answerability([0, 0], [0.5, 0.4])["f1_score"] == 66.67


def test_no_unanswerable_image_gives_zero():
    assert answerability([1, 1], [0.2, 0.8]) == {"average_precision": 0.0, "f1_score": 0.0}


@pytest.mark.parametrize(
    ("label", "confidence", "message"),
    [
        (2, 0.5, "image '0': answerable must be 0 or 1"),
        (1, "0.5", "image '0': answerable must be a number"),
        (1, float("nan"), "image '0': answerable must be a number"),
        (1, float("-inf"), "image '0': answerable must be a number"),
        pytest.param(1, 10**400, "image '0': answerable must be a number", id="no double holds it"),
    ],
)
def test_what_cannot_be_ranked_is_refused(label, confidence, message):
    with pytest.raises(ValueError, match=message):
        answerability([label], [confidence])


def test_a_missing_confidence_is_named():
    with pytest.raises(ValueError, match="result of image 'a' has no 'answerable'"):
        vizwiz.evaluate_answerability([annotation("a", [])], [{"image": "a", "answer": "x"}])
