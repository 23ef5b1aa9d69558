"""GQA's metrics on small question files, its errors, and the official report lines."""

import copy
import json

import pytest

from eval_vqa import gqa


def question(answer="red", *, balanced=True, structural="query", semantic="attr", detailed="color", group="g", text="What color is it?",
             steps=(("select", "cat"), ("query", "color")), entailed=()):  # fmt: skip
    return {
        "question": text, "imageId": "1", "answer": answer, "isBalanced": balanced, "groups": {"global": group, "local": None},
        "types": {"structural": structural, "semantic": semantic, "detailed": detailed}, "entailed": list(entailed),
        "semantic": [{"operation": operation, "argument": argument, "dependencies": []} for operation, argument in steps],
        "annotations": {"question": {}, "answer": {}, "fullAnswer": {}},
    }  # fmt: skip


def predict(**answers):
    return [{"questionId": key, "prediction": answer} for key, answer in answers.items()]


def test_binary_is_every_structure_but_query():
    questions = {"a": question(), "b": question("yes", structural="verify"), "c": question("no", structural="logical")}
    scores = gqa.evaluate(questions, predict(a="red", b="yes", c="yes"))
    assert (scores["open"], scores["binary"], scores["accuracy"]) == (100.0, 50.0, pytest.approx(200 / 3))
    assert scores["accuracyPerStructuralType"]["logical"] == {"accuracy": 0.0, "count": 1}


def test_equality_is_exact():
    questions = {"a": question("red"), "b": question("red"), "c": question("red")}
    assert gqa.evaluate(questions, predict(a="Red", b="red ", c=5))["accuracy"] == 0.0


def test_what_was_not_asked_for_is_none_and_what_did_not_qualify_is_zero():
    scores = gqa.evaluate({"a": question()}, predict(a="red"))
    assert [scores[key] for key in ("consistency", "validity", "plausibility", "grounding")] == [None] * 4
    assert scores["binary"] == 0.0
    assert gqa.evaluate({"a": question()}, predict(a="red"), consistency=True)["consistency"] == 0.0


def test_only_balanced_questions_are_scored_and_need_a_prediction():
    questions = {"a": question(), "b": question(balanced=False)}
    assert gqa.evaluate(questions, predict(a="red"))["accuracyPerSemanticType"] == {"attr": {"accuracy": 100.0, "count": 1}}
    with pytest.raises(ValueError, match="missing predictions 1: 'b'"):
        gqa.evaluate(questions, predict(a="red"), consistency=True)


def test_words_are_separated_by_white_space_and_steps_exclude_what_only_asks():
    asking = [("select", "cat"), ("exist", "?"), ("relate", "existing thing"), ("query", "name"), ("choose name", "x"), ("query", "color")]
    scores = gqa.evaluate({"a": question(text="Is  it red ?", steps=asking)}, predict(a="red"))
    assert list(scores["accuracyPerLength"]) == [4]
    assert list(scores["accuracyPerSteps"]) == [2]


def test_validity_and_plausibility_and_the_common_rule():
    questions = {"a": question(), "b": question(detailed="twoCommon"), "c": question(detailed="common")}
    choices = {key: {"valid": ["red", "blue"], "plausible": ["red"]} for key in "abc"}
    scores = gqa.evaluate(questions, predict(a="blue", b="material", c="material"), choices=choices)
    assert (scores["validity"], scores["plausibility"]) == (pytest.approx(200 / 3), pytest.approx(100 / 3))


def test_consistency_is_a_mean_of_means_over_right_answers_with_consequences():
    questions = {
        "a": question(entailed=["a", "b", "c", "c"]), "b": question("yes", balanced=False), "c": question("no"),
        "d": question(entailed=["b"]), "e": question(entailed=["e"]),
    }  # fmt: skip
    predictions = predict(a="red", b="yes", c="yes", d="blue", e="red")
    assert gqa.evaluate(questions, predictions, consistency=True)["consistency"] == pytest.approx(100 / 3)


def test_distribution():
    """Group g: gold red 2, blue 1; predicted red 1, green 2 -> (1-2)^2/2 + (0-1)^2/1 = 1.5, three questions. Group h: 0, one question."""
    questions = {
        "a": question("red"), "b": question("red"), "c": question("blue"), "d": question("x", group="h"), "e": question("y", group=None),
    }  # fmt: skip
    scores = gqa.evaluate(questions, predict(a="red", b="green", c="green", d="x", e="y"))
    assert scores["distribution"] == pytest.approx(1.5 * 3 / 4 / 100)


def test_the_last_prediction_counts_and_unknown_ids_do_no_harm():
    predictions = predict(a="blue", zz="x") + predict(a="red")
    assert gqa.evaluate({"a": question()}, predictions)["accuracy"] == 100.0


def test_nothing_that_was_given_is_changed():
    questions, predictions = {"a": question(entailed=["a", "b"]), "b": question(balanced=False)}, predict(a="red", b="red")
    before = copy.deepcopy((questions, predictions))
    gqa.evaluate(questions, predictions, choices={"a": {"valid": [], "plausible": []}}, consistency=True)
    assert (questions, predictions) == before


@pytest.mark.parametrize(
    ("questions", "predictions", "options", "message"),
    [
        ({"a": question()}, [], {}, "missing predictions 1: 'a'"),
        ({"a": question()}, {"a": "red"}, {}, "predictions must be a JSON list"),
        ({"a": question()}, [{"questionId": "a"}], {}, "'a' in predictions has no 'prediction'"),
        ({"a": question()}, predict(a="red"), {"choices": {}}, "question 'a': the choices file has no 'a'"),
        ({"a": question(entailed=["zz"])}, predict(a="red"), {"consistency": True}, "question 'a': entails questions .* 1: 'zz'"),
        ({"a": question(group=None)}, predict(a="red"), {}, "global group"),
        ({}, [], {}, "global group"),
        ({"a": question()}, predict(a="red"), {"grounding": True}, "attentions and scene_graphs not given"),
        ({"a": question()}, predict(a=["red"]), {}, "question 'a'"),
        ([question()], [], {}, "object of questions by id"),
        ({"a": {"isBalanced": True}}, predict(a="red"), {}, "question 'a': the question has no 'answer'"),
    ],
)
def test_what_the_official_program_fails_on_is_an_error_that_names_it(questions, predictions, options, message):
    with pytest.raises(ValueError, match=message):
        gqa.evaluate(questions, predictions, **options)


REPORT = """\
Binary: 100.00%
Open: 0.00%
Accuracy: 66.67%
Consistency: 50.00%
Distribution: 0.01 (lower is better)

Accuracy / structural type:
  query: 0.00% (1 questions)
  verify: 100.00% (2 questions)

Accuracy / semantic type:
  attr: 66.67% (3 questions)

Accuracy / steps number:
  2: 66.67% (3 questions)

Accuracy / words number:
  4: 50.00% (2 questions)
  11: 100.00% (1 questions)"""


def test_the_report_has_a_line_for_everything_that_was_asked_for():
    scores = {"binary": 1.0, "open": 2.0, "accuracy": 3.0, "consistency": 4.0, "validity": 5.0, "plausibility": 6.0, "grounding": 130.456,
              "distribution": 1.875, **{name: {} for name in gqa.BLOCKS}}  # fmt: skip
    assert gqa.report(scores).split("\n\n")[0] == (
        "Binary: 1.00%\nOpen: 2.00%\nAccuracy: 3.00%\nConsistency: 4.00%\nValidity: 5.00%\nPlausibility: 6.00%\nGrounding: 130.46%\n"
        "Distribution: 1.88 (lower is better)"
    )


def test_equivalent_questions_are_not_used():
    questions = {"a": {**question(), "equivalent": ["b"]}, "b": question("no", balanced=False)}
    assert gqa.evaluate(questions, predict(a="red", b="yes"), consistency=True)["consistency"] == 0.0


def test_a_missing_prediction_of_an_unbalanced_question_does_no_harm_without_consistency():
    assert gqa.evaluate({"a": question(), "b": question(balanced=False)}, predict(a="red"))["accuracy"] == 100.0


def test_ids_are_strings():
    with pytest.raises(ValueError, match="missing predictions 1: '1'"):
        gqa.evaluate({"1": question()}, [{"questionId": 1, "prediction": "red"}])


def test_an_error_about_a_big_file_does_not_list_all_of_it():
    """val_choices.json has entries for a hundred thousand questions; the message was as long as all their ids."""
    choices = {f"other{place}": {"valid": [], "plausible": []} for place in range(1000)}
    with pytest.raises(ValueError, match=r"question 'a': the choices file has no 'a'; it has \['other0', .* and 980 more$") as raised:
        gqa.evaluate({"a": question()}, predict(a="red"), choices=choices)
    assert len(str(raised.value)) < 400


def test_choices_are_needed_for_balanced_questions_only():
    questions = {"a": question(), "b": question(balanced=False)}
    choices = {"a": {"valid": ["red"], "plausible": []}}
    scores = gqa.evaluate(questions, predict(a="red", b="red"), choices=choices)
    assert (scores["validity"], scores["plausibility"]) == (100.0, 0.0)


def reported():
    questions = {
        "a": question("yes", structural="verify", entailed=["b", "c"]), "b": question("red"),
        "c": question("yes", structural="verify", text="one two three four five six seven eight nine ten eleven"),
    }  # fmt: skip
    return gqa.evaluate(questions, predict(a="yes", b="blue", c="yes"), consistency=True)


def test_the_report_has_the_official_lines_and_none_for_none():
    assert gqa.report(reported()) == REPORT


def test_the_report_of_a_saved_file_is_the_same():
    """JSON turns the numbers of words into strings; "11" must still come after "4"."""
    assert gqa.report(json.loads(json.dumps(reported()))) == REPORT
