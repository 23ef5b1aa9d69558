"""Exact match on one's own questions, through the command line as a user would."""

import json

import pytest
from fake_engine import FakeEngine, FakeRequest
from PIL import Image

from eval_vqa import exact_match
from eval_vqa.command_line import main


def evaluate(answer, prediction):
    return exact_match.evaluate([{"id": "a", "answer": answer}], [{"id": "a", "answer": prediction}])["accuracy"]


@pytest.mark.parametrize(
    ("answer", "prediction", "percent"),
    [("Red", " red. ", 100.0), (["red", "crimson"], "Crimson", 100.0), ("red", "the red", 0.0), ("2", "two", 0.0)],
)
def test_only_case_final_periods_and_white_space_are_forgiven(answer, prediction, percent):
    assert evaluate(answer, prediction) == percent


@pytest.mark.parametrize("answer", [[], None, [3]])
def test_a_question_without_an_answer_in_text_is_an_error(answer):
    with pytest.raises(ValueError, match="question 'a': "):
        evaluate(answer, "x")


def test_one_id_for_two_questions_is_an_error(tmp_path):
    """The first of them was never asked, and the run said that all questions had their answer."""
    rows = [{"id": 1, "image": "x.png", "question": question, "answer": "a"} for question in ("one?", "two?")]
    for read in (lambda: exact_match.read_questions(rows, tmp_path), lambda: exact_match.evaluate(rows, [{"id": 1, "answer": "a"}])):
        with pytest.raises(ValueError, match="different questions, 1: 1; give each question an id of its own"):
            read()
    assert len(exact_match.read_questions([rows[0], dict(rows[0])], tmp_path)) == 1  # the same one twice is asked once


def test_run_predicts_and_scores(tmp_path, monkeypatch, capsys):
    import eval_vqa.predicting as predicting

    Image.new("RGB", (2, 2), (7, 0, 0)).save(tmp_path / "x.png")
    rows = [{"id": name, "image": "x.png", "question": name, "answer": f"(7, 0, 0) {name}"} for name in ("one", "two")]
    (tmp_path / "test.json").write_text(json.dumps(rows))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    original = predicting.predict
    monkeypatch.setattr(predicting, "predict", lambda *args, **kwargs: original(*args, **{**kwargs, "make_request": FakeRequest}))
    args = ["run", "--model", str(tmp_path / "model"), "--data", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main("exact_match", args, load_engine=lambda args: FakeEngine()) == 0
    assert "100.00%" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main("exact_match", ["baseline", "--train", "x"])
