"""Relaxed accuracy: five percent for numbers, the same letters for the rest."""

import pytest

from eval_vqa import chartqa


@pytest.mark.parametrize(
    ("prediction", "answer", "right"),
    [
        ("105", "100", True),
        ("95", "100", True),
        ("105.1", "100", False),
        ("-95", "-100", True),
        ("5%", "5.2%", True),
        ("0.05", "5%", True),  # a percentage is so many hundredths
        ("5", "5%", False),
        ("0", "0", True),
        ("0.0", "0", False),  # a true 0 is compared as text
        ("0.001", "0", False),
        ("Yes", "yes", True),
        ("yes.", "yes", False),
        ("1,000", "1000", False),  # not a number for the source either
        ("Blue", "Red", False),
        ("nan", "nan", True),
        ("inf", "5", False),
        ("", "5", False),
    ],
)
def test_is_right(prediction, answer, right):
    assert chartqa.is_right(prediction, answer) is right


def test_ids_are_places_in_the_file():
    rows = [{"imgname": "a.png", "query": "q", "label": 12}, {"imgname": "b.png", "query": "r", "label": "Red"}]
    results = [{"id": "0", "answer": "12.5"}, {"id": "1", "answer": "green"}]
    assert chartqa.evaluate(rows, results) == {"accuracy": 50.0, "evalQA": {"0": 100.0, "1": 0.0}}
    assert chartqa.evaluate(rows, results[:1], question_ids=["0"])["accuracy"] == 100.0
    with pytest.raises(ValueError, match="1: '1'"):
        chartqa.evaluate(rows, results[:1])


def test_a_number_as_prediction_is_an_error():
    with pytest.raises(ValueError, match="question '0': an answer must be a string"):
        chartqa.evaluate([{"imgname": "a", "query": "q", "label": "1"}], [{"id": "0", "answer": 1}])


def test_the_official_folder(tmp_path):
    (tmp_path / "test" / "png").mkdir(parents=True)
    (tmp_path / "test" / "test_human.json").write_text('[{"imgname": "a.png", "query": "q", "label": "1"}]')
    found = chartqa.locate(tmp_path, None)
    (row,) = chartqa.read_questions([{"imgname": "a.png", "query": "q", "label": "1"}], found.images)
    assert (found.split, row.id, row.image) == ("test_human", "0", tmp_path / "test" / "png" / "a.png")
    with pytest.raises(ValueError, match="list of questions"):
        chartqa.read_questions({}, tmp_path)
    with pytest.raises(FileNotFoundError, match="val_human"):
        chartqa.locate(tmp_path, "val_human")
