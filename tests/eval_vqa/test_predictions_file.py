"""The growing file: whole lines only, whatever a killed process left of one, and several writers."""

import contextlib
import json
import os

import pytest

import eval_vqa.predicting as predicting
from eval_vqa.predictions_file import PredictionsFile, keep_answered, line, read_rows


def row(key, **more):
    return {"question_id": key, "answer": str(key), **more}


def ids(path):
    return [json.loads(text)["question_id"] for text in path.read_text().splitlines()]


def test_lines_of_others_are_seen(tmp_path):
    path = tmp_path / "predictions.jsonl"
    one, other = PredictionsFile(path, "vqav2"), PredictionsFile(path, "vqav2")
    one.append(row(1))
    other.append(row(2))
    one.append(row(3))
    assert ids(path) == [1, 2, 3]
    other.refresh()
    assert list(other.rows) == [1, 2, 3]


def test_several_lines_are_one_transaction(tmp_path):
    """Of eight ranks on a shared file system each of them takes milliseconds, and there are half a million answers."""
    path, held = tmp_path / "predictions.jsonl", []

    @contextlib.contextmanager
    def locked():
        held.append(path.read_bytes() if path.exists() else b"")
        yield

    file = PredictionsFile(path, "vqav2", locked)
    file.append(row(1), row(2))
    path.write_bytes(path.read_bytes() + line(row(3))[:-4])
    file.append(row(4), row(5), row(6))
    assert ids(path) == list(file.rows) == [1, 2, 4, 5, 6] and len(held) == 2  # its own are known at once: a bar counts them


def test_answers_are_written_once_a_second_and_at_the_end(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(predicting.time, "monotonic", lambda: now[0])
    path = tmp_path / "predictions.jsonl"
    pending = predicting._Pending(PredictionsFile(path, "vqav2"))
    pending.add(row(1))
    assert ids(path) == [1]  # one that comes alone waits for nothing
    now[0] = 0.9
    pending.add(row(2))
    pending.add(row(3))
    assert ids(path) == [1]
    now[0] = 1.1
    pending.add(row(4))
    assert ids(path) == [1, 2, 3, 4] and pending.rows == []
    now[0] = 60.0
    pending.add(row(5))
    assert ids(path) == [1, 2, 3, 4, 5]
    pending.add(row(6))
    pending.write()
    pending.write()
    assert ids(path) == [1, 2, 3, 4, 5, 6]


def test_a_torn_line_is_cut_off_before_the_next_is_written(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(line(row(1)) + line(row(2))[:-9])
    file = PredictionsFile(path, "vqav2")
    file.refresh()
    assert list(file.rows) == [1]
    file.append(row(3))
    assert ids(path) == [1, 3]


def test_a_line_that_only_lacks_its_line_feed_is_kept(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(line(row(1))[:-1])
    PredictionsFile(path, "vqav2").append(row(2))
    assert ids(path) == [1, 2]


def test_every_possible_tear_of_the_last_line_leaves_a_readable_file(tmp_path):
    """Wherever the kill fell, the next writer and the reader agree, and nothing before is lost."""
    path = tmp_path / "predictions.jsonl"
    last = line(row(2, text="a \u00e9 \u4e2d"))
    for cut in range(len(last) + 1):
        path.write_bytes(line(row(1)) + last[:cut])
        before = [found["question_id"] for found in read_rows(path, "vqav2")]
        PredictionsFile(path, "vqav2").append(row(3))
        assert ids(path) == [*before, 3]
        assert before[0] == 1


def test_a_file_that_was_replaced_is_read_from_its_start(tmp_path):
    path = tmp_path / "predictions.jsonl"
    file = PredictionsFile(path, "vqav2")
    for key in (1, 2):
        file.append(row(key, problem="x" if key == 1 else None))
    keep_answered(path, "vqav2")
    file.refresh()
    assert list(file.rows) == [2]


def test_the_first_line_of_a_question_counts(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(line(row(1)) + line({"question_id": 1, "answer": "later"}))
    file = PredictionsFile(path, "vqav2")
    file.refresh()
    assert file.rows[1]["answer"] == "1"


def test_a_broken_line_in_the_middle_is_an_error(tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_bytes(b"{broken}\n" + line(row(1)))
    with pytest.raises(ValueError, match="not valid JSON: b'{broken}'"):
        PredictionsFile(path, "vqav2").refresh()


def test_each_line_is_written_under_the_lock(tmp_path):
    held = []

    class Lock:
        def __enter__(self):
            held.append(os.path.exists(tmp_path / "p.jsonl"))

        def __exit__(self, *_):
            held.append(True)

    PredictionsFile(tmp_path / "p.jsonl", "vqav2", Lock).append(row(1))
    assert held == [False, True]
