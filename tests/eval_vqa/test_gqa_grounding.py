"""GQA's grounding score, with its inert scene rule."""

import pytest

from eval_vqa import gqa
from eval_vqa.gqa_grounding import grounding_score

SCENE = {"width": 200, "height": 100, "objects": {"1": {"x": 0, "y": 0, "w": 100, "h": 50}, "2": {"x": 150, "y": 0, "w": 100, "h": 100}}}
EVEN = [[0.25, 0.25], [0.25, 0.25]]


def question(asked=(), answered=(), steps=()):
    number = {"question": dict(enumerate(asked)), "answer": {"0": "999"}, "fullAnswer": dict(enumerate(answered))}
    return {"annotations": number, "semantic": list(steps)}


def test_the_first_index_of_a_map_runs_along_x():
    right_top = [[0, 0], [1.0, 0]]
    assert grounding_score(question(["2"]), SCENE, right_top, 2) == pytest.approx(0.5)
    assert grounding_score(question(["1"]), SCENE, right_top, 2) == 0.0


def test_regions_add_up_and_repeat_so_the_score_may_exceed_one():
    everything = [[5.0, 0], [0, 0]]
    assert grounding_score(question(["1", "1"], ["1"]), SCENE, everything, 2) == pytest.approx(15.0)


def test_the_last_digit_is_that_of_the_official_order_of_operations():
    """weight * (intersection / area); (weight * intersection) / area ends in ...99."""
    assert grounding_score(question(["2"]), SCENE, [[0.1] * 7] * 7, 7) == 1.2249999999999996


def test_no_region_gives_zero():
    assert grounding_score(question(), SCENE, EVEN, 2) == 0.0


def test_the_scene_rule_looks_for_a_key_and_so_stays_inert():
    assert grounding_score(question(steps=[{"operation": "select", "argument": "scene"}]), SCENE, EVEN, 2) == 0.0
    assert grounding_score(question(steps=[{"scene": 1}]), SCENE, EVEN, 2) == pytest.approx(1.0)


def test_object_attention_uses_its_boxes():
    boxes = [[0.0, 0.0, 0.25, 0.5, 0.75], [0.25, 0.0, 0.75, 0.5, 0.25]]
    assert grounding_score(question(["1"]), SCENE, boxes, 7) == pytest.approx(0.75 + 0.25 * 0.5)


def test_a_larger_map_than_asked_for_is_read_from_its_corner():
    assert grounding_score(question(["1"]), SCENE, [[1.0, 0, 9], [0, 0, 9], [9, 9, 9]], 2) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("attention", "message"),
    [([[1.0] * 3] * 3, "found 3 rows of"), ([], "found 0 rows"), ([[0.5, 0, 0.5, 1, 1.0]], "x0 < x1"), (5, "list of lists")],
)
def test_an_attention_of_neither_form_is_refused(attention, message):
    with pytest.raises(ValueError, match=message):
        grounding_score(question(["1"]), SCENE, attention, 7)


def test_an_unknown_object_is_named():
    with pytest.raises(ValueError, match="no '8'"):
        grounding_score(question(["8"]), SCENE, EVEN, 2)


def test_an_image_without_width_is_refused():
    with pytest.raises(ValueError, match="0 x 100"):
        grounding_score(question(["1"]), {**SCENE, "width": 0}, EVEN, 2)


def test_evaluate_averages_over_balanced_questions_in_percent():
    asked = {
        "imageId": "i", "question": "what?", "answer": "x", "isBalanced": True, "groups": {"global": "g"},
        "types": {"structural": "query", "semantic": "obj", "detailed": "d"}, "entailed": [],
    }  # fmt: skip
    questions = {"a": {**asked, **question(["1"])}, "b": {**asked, **question()}}
    predictions = [{"questionId": key, "prediction": "x"} for key in "ab"]
    attentions = [{"questionId": key, "attention": EVEN} for key in "ab"]
    options = {"scene_graphs": {"i": SCENE}, "grounding": True, "map_size": 2}
    assert gqa.evaluate(questions, predictions, attentions=attentions, **options)["grounding"] == pytest.approx(12.5)
    with pytest.raises(ValueError, match="question 'b': the attentions has no 'b'"):
        gqa.evaluate(questions, predictions, attentions=attentions[:1], **options)
