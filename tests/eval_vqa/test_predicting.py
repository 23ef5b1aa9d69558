"""Predicting: what is asked, what is written, and that a kill loses and repeats nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import pytest
from fake_engine import FakeEngine, FakeRequest
from PIL import Image

from eval_vqa import asking
from eval_vqa.image_files import load_image
from eval_vqa.official_files import Question
from eval_vqa.predicting import PredictSettings, predict


def make_questions(folder, count=7, images=3):
    for number in range(images):
        Image.new("RGB", (4 + number, 3), (number, 0, 0)).save(folder / f"{number}.png")
    return [Question(key, f"Q{key}", folder / f"{key % images}.png") for key in range(count)]


def run(questions, out, engine=None, task="vqav2", **settings):
    engine = engine or FakeEngine()
    return engine, predict(task, questions, engine, out, PredictSettings(**settings), make_request=FakeRequest)


def lines(out):
    return [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]


def test_every_question_is_asked_once_with_its_image_and_the_pinned_prompt(tmp_path):
    engine, outcome = run(make_questions(tmp_path), tmp_path / "out", at_a_time=3, max_new_tokens=9)
    assert engine.batches == [3, 3, 1]
    assert engine.asked[0][1:] == ("Q0\nAnswer the question using a single word or phrase.", 9)
    submission = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert submission == [{"question_id": key, "answer": f"({key % 3}, 0, 0) q{key}"} for key in range(7)]
    assert not outcome.problems


def test_questions_of_one_image_are_neighbours_and_share_the_image(tmp_path):
    engine, _ = run(make_questions(tmp_path), tmp_path / "out")
    assert [text.split("\n")[0] for _, text, _ in engine.asked] == ["Q0", "Q3", "Q6", "Q1", "Q4", "Q2", "Q5"]
    assert engine.asked[0][0] is engine.asked[1][0]


def test_a_line_is_an_official_result_with_its_circumstances(tmp_path):
    run(make_questions(tmp_path, 1), tmp_path / "out")
    assert lines(tmp_path / "out") == [{
        "question_id": 0, "answer": "(0, 0, 0) q0", "text": " (0, 0, 0) Q0. ", "stop_reason": "end_of_turn", "prompt_tokens": 5,
        "visual_tokens": 4, "generated_tokens": 1, "seconds": 0.01, "image_file": "0.png",
        "image_sha256": sha256((tmp_path / "0.png").read_bytes()).hexdigest(),
    }]  # fmt: skip


def test_a_stopped_run_goes_on_where_it_was(tmp_path):
    questions, out = make_questions(tmp_path), tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        run(questions, out, FakeEngine(crash_after=4), at_a_time=3)
    assert len(lines(out)) == 4
    assert not (out / "submission.json").exists()
    engine, outcome = run(questions, out, at_a_time=3)
    assert len(engine.asked) == 3
    assert sorted(row["question_id"] for row in lines(out)) == list(range(7))
    assert [row["question_id"] for row in outcome.rows] == list(range(7))


def test_answers_are_on_disk_before_anything_else_is_asked(tmp_path):
    """Behind a batch its images are let go; another process would ask what it does not find in the file."""
    seen = []

    class Looking(FakeEngine):
        def generate(self, requests, on_answer=None):
            path = tmp_path / "out" / "predictions.jsonl"
            seen.append(len(path.read_text().splitlines()) if path.exists() else 0)
            return super().generate(requests, on_answer)

    run(make_questions(tmp_path), tmp_path / "out", Looking(), at_a_time=3)
    assert seen == [0, 3, 6]


def test_few_pictures_are_in_memory(tmp_path, monkeypatch):
    """However many questions are handed over together: an image is opened when its turn comes, once for all its questions."""
    questions = make_questions(tmp_path, 60, 30)
    opened, asked, ahead = [], set(), []
    plain = asking.load_image

    def noting(path):
        opened.append(path)
        return plain(path)

    class Slow(FakeEngine):
        def generate(self, requests, on_answer=None):
            def one_by_one():
                for request in requests:
                    asked.add(request.messages[0]["content"][1]["text"])
                    ahead.append(len(opened) - len(asked) / 2)
                    yield request

            return super().generate(one_by_one(), on_answer)

    monkeypatch.setattr(asking, "load_image", noting)
    run(questions, tmp_path / "out", Slow())
    assert len(opened) == len(set(opened)) == 30 and max(ahead) <= asking.PICTURES_AHEAD + 1


def test_a_torn_last_line_is_asked_again(tmp_path):
    questions, out = make_questions(tmp_path), tmp_path / "out"
    run(questions, out)
    content = (out / "predictions.jsonl").read_bytes()
    (out / "predictions.jsonl").write_bytes(content[:-9])
    engine, _ = run(questions, out)
    assert [text[:2] for _, text, _ in engine.asked] == ["Q5"]
    assert (out / "predictions.jsonl").read_bytes() == content


def test_a_last_line_that_only_lacks_its_line_feed_is_kept(tmp_path):
    questions, out = make_questions(tmp_path), tmp_path / "out"
    run(questions, out)
    content = (out / "predictions.jsonl").read_bytes()
    (out / "predictions.jsonl").write_bytes(content[:-1])
    engine, _ = run(questions, out)
    assert (engine.asked, (out / "predictions.jsonl").read_bytes()) == ([], content)


def test_a_broken_line_in_the_middle_stops_with_its_number(tmp_path):
    questions, out = make_questions(tmp_path), tmp_path / "out"
    run(questions, out)
    rows = (out / "predictions.jsonl").read_text().splitlines()
    (out / "predictions.jsonl").write_text("\n".join([rows[0], "{", *rows[2:]]) + "\n")
    with pytest.raises(ValueError, match="line 2 is not valid JSON"):
        run(questions, out)


def test_another_run_in_the_folder_is_refused(tmp_path):
    questions, out = make_questions(tmp_path), tmp_path / "out"
    run(questions, out)
    with pytest.raises(ValueError, match="holds another run: grey is False there and True now"):
        run(questions, out, grey=True)


def test_versions_of_every_start_are_kept(tmp_path):
    """Half of the answers from another torch: the record says so, however often it went on."""
    questions, out = make_questions(tmp_path), tmp_path / "out"
    for count, version in ((2, "2.11"), (4, "2.12"), (5, "2.12"), (7, "2.13")):
        predict("vqav2", questions[:count], FakeEngine(), out, PredictSettings(), make_request=FakeRequest,
                identity={"versions": {"torch": version}, "device": "cpu"})  # fmt: skip
    record = json.loads((out / "run.json").read_text())
    assert record["versions"] == {"torch": "2.13"}
    assert [start["versions"]["torch"] for start in record["earlier_starts"]] == ["2.11", "2.12"]


def test_a_finished_run_asks_nothing_and_keeps_its_submission(tmp_path):
    questions, out = make_questions(tmp_path), tmp_path / "out"
    run(questions, out)
    before = (out / "submission.json").read_bytes()
    engine, _ = run(questions, out)
    assert engine.asked == []
    assert (out / "submission.json").read_bytes() == before


def test_more_questions_may_follow(tmp_path):
    questions, out = make_questions(tmp_path), tmp_path / "out"
    run(questions[:2], out)
    engine, outcome = run(questions, out)
    assert (len(engine.asked), len(outcome.rows)) == (5, 7)


def test_grey_keeps_the_upright_size_and_nothing_else(tmp_path):
    picture = Image.new("RGB", (8, 4), (200, 10, 10))
    exif = picture.getexif()
    exif[0x0112] = 6  # turned by a quarter
    picture.save(tmp_path / "turned.jpg", exif=exif)
    engine, _ = run([Question(1, "Q", tmp_path / "turned.jpg")], tmp_path / "out", grey=True)
    image = engine.asked[0][0]
    assert (image.size, image.getcolors()) == ((4, 8), [(32, (127, 127, 127))])


def broken_set(folder):
    questions = make_questions(folder)
    (folder / "1.png").write_bytes((folder / "1.png").read_bytes()[:40])  # the questions 1 and 4
    return questions


def test_a_broken_image_stops_by_default_and_what_was_answered_stays(tmp_path):
    with pytest.raises(ValueError, match=r"question 1: image .*1\.png cannot be read"):
        run(broken_set(tmp_path), tmp_path / "out", at_a_time=3)
    assert len(lines(tmp_path / "out")) == 3


def test_a_missing_image_stops_before_anything_is_asked(tmp_path):
    questions = make_questions(tmp_path)
    (tmp_path / "2.png").unlink()
    engine = FakeEngine()
    with pytest.raises(ValueError, match="image files not found, 1: .*2.png"):
        run(questions, tmp_path / "out", engine)
    assert engine.asked == []


@pytest.mark.parametrize(("on_missing", "submitted"), [("skip", 5), ("blank", 7)])
def test_unreadable_images_are_skipped_or_left_blank_and_listed(tmp_path, on_missing, submitted):
    out = tmp_path / "out"
    _, outcome = run(broken_set(tmp_path), out, on_missing=on_missing)
    assert [problem["question_id"] for problem in outcome.problems] == [1, 4]
    submission = json.loads((out / "submission.json").read_text())
    assert len(submission) == submitted
    assert all(row["answer"] == "" for row in submission if row["question_id"] in (1, 4))
    record = json.loads((out / "run.json").read_text())
    assert (record["counts"]["questions"], record["counts"]["answered"], len(record["problems"])) == (7, 5, 2)


def test_a_repaired_image_is_asked_about_at_the_next_start(tmp_path):
    questions, out = broken_set(tmp_path), tmp_path / "out"
    run(questions, out, on_missing="blank")
    make_questions(tmp_path)
    engine, outcome = run(questions, out)
    assert (len(engine.asked), outcome.problems) == (2, [])
    assert sorted(row["question_id"] for row in lines(out)) == list(range(7))


def test_a_failed_request_is_a_wrong_answer_that_is_listed_and_asked_again(tmp_path):
    questions, out = make_questions(tmp_path), tmp_path / "out"
    _, outcome = run(questions, out, FakeEngine(fail=("Q2",)))
    assert outcome.problems == [{"question_id": 2, "problem": "the engine failed: too long"}]
    assert json.loads((out / "submission.json").read_text())[2] == {"question_id": 2, "answer": ""}
    engine, outcome = run(questions, out)
    assert (len(engine.asked), outcome.problems) == (1, [])


def test_an_engine_without_progress_reports_is_fine(tmp_path):
    class Silent(FakeEngine):
        def generate(self, requests, on_answer=None):
            return super().generate(requests, lambda index, answer: None)

    run(make_questions(tmp_path), tmp_path / "out", Silent())
    assert len(lines(tmp_path / "out")) == 7


def test_an_engine_that_forgets_a_request_is_an_error(tmp_path):
    class Forgetful(FakeEngine):
        def generate(self, requests, on_answer=None):
            return super().generate(list(requests)[:-1], on_answer)

    with pytest.raises(RuntimeError, match="6 answers to 7 requests"):
        run(make_questions(tmp_path), tmp_path / "out", Forgetful())


@pytest.mark.parametrize("settings", [{"on_missing": "ignore"}, {"at_a_time": 0}, {"max_new_tokens": 0}])
def test_settings_check_themselves(settings):
    with pytest.raises(ValueError, match="must be"):
        PredictSettings(**settings)


def test_a_text_file_is_no_image(tmp_path):
    (tmp_path / "x.jpg").write_text("hello")
    with pytest.raises(ValueError, match="x.jpg cannot be read"):
        load_image(tmp_path / "x.jpg")


@pytest.mark.parametrize("error", [RuntimeError("no planes"), KeyError("tag")])
def test_whatever_a_decoder_raises_is_an_unreadable_image(tmp_path, monkeypatch, error):
    """Pillow's AVIF decoder raises RuntimeError: one damaged file ended the run instead of being listed."""
    questions = make_questions(tmp_path, 3)

    def broken(*_):
        raise error

    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load", broken)
    _, outcome = run(questions, tmp_path / "out", on_missing="skip")
    assert len(outcome.problems) == 3 and "0.png cannot be read" in outcome.problems[0]["problem"]


@dataclass
class SwitchRequest(FakeRequest):
    """A request as the engine's, with the switch of reasoning checkpoints."""

    thinking: bool | None = None


class Noting(FakeEngine):
    def generate(self, requests, on_answer=None):
        self.requests = list(requests)
        return super().generate(self.requests, on_answer)


@pytest.mark.parametrize("thinking", [False, True])
def test_reasoning_checkpoints_think_only_when_told(tmp_path, thinking):
    """Left to its habit such a model thinks, the answer's 16 tokens end within the thoughts, and every answer of the run is empty. What
    would be the probability of "unanswerable" is then one of the thoughts."""
    engine = Noting()
    questions = make_questions(tmp_path, 1)
    predict("vizwiz", questions, engine, tmp_path / "out", PredictSettings(thinking=thinking), make_request=SwitchRequest)
    assert engine.requests[0].thinking is thinking
    assert bool(engine.requests[0].score_texts) is not thinking
    assert (tmp_path / "out" / "answerability.json").exists() is not thinking
    assert json.loads((tmp_path / "out" / "run.json").read_text())["thinking"] is thinking
    with pytest.raises(ValueError, match=f"thinking is {thinking} there and {not thinking} now"):
        predict("vizwiz", questions, engine, tmp_path / "out", PredictSettings(thinking=not thinking), make_request=SwitchRequest)


def test_thinking_asked_of_a_checkpoint_without_it_stops_the_run(tmp_path, tiny_processor):
    engine = Noting()
    engine.processor = tiny_processor
    with pytest.raises(ValueError, match="no thinking switch"):
        predict("vqav2", make_questions(tmp_path), engine, tmp_path / "out", PredictSettings(thinking=True), make_request=SwitchRequest)


class Tiler:
    """The two things predicting reads of a processor."""

    visual_tokens_per_tile = 2

    class image_processor:
        @staticmethod
        def count_tiles(width, height):
            return 2 if width == 4 else 5


def test_a_line_says_how_many_tiles_were_used_and_the_run_counts_them(tmp_path):
    engine = FakeEngine()
    engine.processor = Tiler()
    run(make_questions(tmp_path, 3, images=2), tmp_path / "out", engine)
    found = {row["question_id"]: (row["tiles"], row.get("tiles_wanted")) for row in lines(tmp_path / "out")}
    assert found == {0: (2, None), 1: (2, 5), 2: (2, None)}  # 4 visual tokens are 2 tiles; the image of 1 wanted 5
    counts = json.loads((tmp_path / "out" / "run.json").read_text())["counts"]
    assert (counts["tiles"], counts["tiles_reduced"], counts["images"]) == ({"2": 3}, 1, 2)


def test_vizwiz_hands_in_the_probability_that_a_question_can_be_answered(tmp_path):
    """Two spellings of 0.25 each: 0.5 that it cannot be."""
    run(make_questions(tmp_path, 2), tmp_path / "out", task="vizwiz")
    assert json.loads((tmp_path / "out" / "answerability.json").read_text()) == [
        {"image": 0, "answerable": pytest.approx(0.5)}, {"image": 1, "answerable": pytest.approx(0.5)},
    ]  # fmt: skip
    assert not (tmp_path / "other").exists()
    run(make_questions(tmp_path, 2), tmp_path / "other")
    assert not (tmp_path / "other" / "answerability.json").exists()


@pytest.mark.parametrize(("task", "keys"), [("vqav2", ["question_id", "answer"]), ("gqa", ["questionId", "prediction"]),
                                            ("vizwiz", ["image", "answer"])])  # fmt: skip
def test_a_submission_has_the_keys_of_its_server_and_no_others(tmp_path, task, keys):
    run(make_questions(tmp_path), tmp_path / "out", task=task)
    assert all(list(row) == keys for row in json.loads((tmp_path / "out" / "submission.json").read_text()))


def test_the_engine_is_made_only_when_there_is_something_to_ask(tmp_path):
    questions, out, made = make_questions(tmp_path), tmp_path / "out", []

    def make():
        made.append(FakeEngine())
        return made[-1]

    for _ in range(2):
        predict("vqav2", questions, make, out, make_request=FakeRequest)
    assert len(made) == 1


def test_a_pictures_hash_changes_the_hash_of_all(tmp_path):
    questions = make_questions(tmp_path)
    hashes = []
    for name in ("a", "b"):
        run(questions, tmp_path / name)
        hashes.append(json.loads((tmp_path / name / "run.json").read_text())["images_sha256"])
        Image.new("RGB", (4, 3), (9, 9, 9)).save(tmp_path / "0.png")
    assert hashes[0] != hashes[1]


SLOW = """
import sys, time
from pathlib import Path
sys.path[:0] = {path!r}
from fake_engine import FakeEngine
from test_predicting import make_questions, run

class Slow(FakeEngine):
    def generate(self, requests, on_answer=None):
        def later(index, answer):
            time.sleep(0.02)
            on_answer(index, answer)
        return super().generate(requests, later)

run(make_questions(Path({folder!r}), 60), Path({folder!r}) / "out", Slow(), at_a_time=8)
"""


def test_killed_again_and_again_each_question_is_there_once(tmp_path):
    """Real processes and SIGKILL; each start gets some ten answers further."""
    code = SLOW.format(path=[str(Path(__file__).parent), str(Path(__file__).parents[2])], folder=str(tmp_path))
    path, kills = tmp_path / "out" / "predictions.jsonl", 0
    while True:
        before = path.stat().st_size if path.exists() else 0
        process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
        limit = time.monotonic() + 60
        while process.poll() is None and time.monotonic() < limit:
            if kills < 3 and path.exists() and path.stat().st_size > before + 1500:
                os.kill(process.pid, signal.SIGKILL)
                kills += 1
                break
            time.sleep(0.002)
        code_of_end = process.wait(timeout=60)
        if code_of_end == 0:
            break
        assert code_of_end == -signal.SIGKILL
    assert kills == 3
    assert sorted(row["question_id"] for row in lines(tmp_path / "out")) == list(range(60))
    assert len(json.loads((tmp_path / "out" / "submission.json").read_text())) == 60
