"""The majority answer per question type, the ceiling, and the question type of a text."""

import pytest

from eval_vqa import vizwiz
from eval_vqa.baselines import ceiling, fit_majority, majority_results
from eval_vqa.question_types import QUESTION_TYPES, question_type


def test_there_are_65_question_types():
    assert len(QUESTION_TYPES) == len(set(QUESTION_TYPES)) == 65


@pytest.mark.parametrize(
    ("question", "kind"),
    [
        ("What color is the cat?", "what color is the"), ("what is the color of the cat", "what is the color of the"),
        ("Is this a dog?", "is this a"), ("Is thisa dog?", "is"), ("How many?", "how many"), ("Name it.", "none of the above"),
        ("Are there, in fact, any?", "are there"), ("", "none of the above"),
    ],
)  # fmt: skip
def test_the_longest_prefix_of_whole_words_is_the_type(question, kind):
    assert question_type(question) == kind


def vqav2_annotations(*rows):
    return {"annotations": [{"question_id": key, "question_type": kind, "multiple_choice_answer": answer} for key, kind, answer in rows]}


def test_majority_is_fitted_per_type_with_ties_in_alphabetical_order():
    train = vqav2_annotations((1, "is the", "yes"), (2, "is the", "yes"), (3, "is the", "no"), (4, "what", "red"), (5, "what", "blue"))
    assert fit_majority(train) == {"is the": "yes", "what": "blue", "": "yes"}


def test_an_unseen_type_gets_the_most_frequent_answer_of_all():
    majority = {"is the": "no", "": "yes"}
    questions = {"questions": [{"question_id": 1, "question": "Is the cat red?"}, {"question_id": 2, "question": "Why?"}]}
    assert majority_results(majority, questions) == [{"question_id": 1, "answer": "no"}, {"question_id": 2, "answer": "yes"}]


def test_the_annotated_type_goes_before_the_text():
    questions = {"questions": [{"question_id": 1, "question": "Is the cat red?"}]}
    annotations = vqav2_annotations((1, "why", "x"))
    assert majority_results({"why": "because", "": "yes"}, questions, annotations) == [{"question_id": 1, "answer": "because"}]


def test_gqa_and_vizwiz_use_the_text():
    gqa = {"7": {"question": "Is the cat red?", "answer": "no"}}
    assert majority_results(fit_majority(gqa), gqa) == [{"questionId": "7", "prediction": "no"}]
    rows = [{"image": "a", "question": "Is the cat red?", "answers": [{"answer": "x"}, {"answer": "yes"}, {"answer": "yes"}]}]
    assert majority_results(fit_majority(rows), rows) == [{"image": "a", "answer": "yes"}]


def test_nothing_to_fit_is_an_error():
    with pytest.raises(ValueError, match="no answers"):
        fit_majority([])


def test_the_ceiling_is_the_best_single_answer_per_question():
    def row(image, answers):
        return {"image": image, "question": "q", "answers": [{"answer": answer} for answer in answers], "answer_type": "other"}

    rows = [row("a", ["x"] * 2 + ["y"] * 3 + list("abcde")), row("b", ["x"] * 10), row("c", ["Upper"] * 9 + ["low"])]
    assert ceiling(rows) == pytest.approx((90 + 100 + 30) / 3)  # an answer with a capital can never be matched
    best = [{"image": image, "answer": answer} for image, answer in (("a", "y"), ("b", "x"), ("c", "low"))]
    assert vizwiz.evaluate(rows, best)["accuracy"] == round(ceiling(rows), 2)
