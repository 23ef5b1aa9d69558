"""Several real processes on one run, killed and started again in other numbers: each question once, and asked of one engine only."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from fake_engine import FakeEngine, FakeRequest
from test_predicting import make_questions

from eval_vqa.predicting import PredictSettings, predict
from eval_vqa.ranks import Rank

QUESTIONS, IMAGES = 240, 40
RANK = """
import sys, time
sys.path[:0] = {path!r}
from test_many_ranks import take_part
take_part({folder!r}, {number}, {world})
"""


class Logged(FakeEngine):
    """Writes down every question before it answers it, a hundredth of a second later."""

    def __init__(self, log):
        super().__init__()
        self.log = log

    def generate(self, requests, on_answer=None):
        requests = list(requests)

        def slowly(index, answer):
            with open(self.log, "a") as file:
                file.write(requests[index].messages[0]["content"][1]["text"].split("\n")[0] + "\n")
            time.sleep(0.004)
            on_answer(index, answer)

        return super().generate(requests, slowly)


def take_part(folder, number, world):
    """What one rank does; called in a process of its own."""
    folder = Path(folder)
    questions = make_questions(folder, QUESTIONS, IMAGES) if not (folder / "made").exists() else question_list(folder)
    engine = Logged(folder / f"asked.{os.getpid()}")
    predict("vqav2", questions, engine, folder / "out", PredictSettings(at_a_time=8), make_request=FakeRequest, rank=Rank(number, world))


def question_list(folder):
    from eval_vqa.official_files import Question

    return [Question(key, f"Q{key}", folder / f"{key % IMAGES}.png") for key in range(QUESTIONS)]


def start(folder, world):
    path = [str(Path(__file__).parent), str(Path(__file__).parents[2])]
    return [
        subprocess.Popen([sys.executable, "-c", RANK.format(path=path, folder=str(folder), number=number, world=world)],
                         stderr=subprocess.DEVNULL)
        for number in range(world)
    ]  # fmt: skip


def prepare(folder):
    make_questions(folder, QUESTIONS, IMAGES)
    (folder / "made").touch()


def lines(folder):
    path = folder / "out" / "predictions.jsonl"
    return [json.loads(line)["question_id"] for line in path.read_text().splitlines()] if path.exists() else []


def wait_for(folder, count):
    limit = time.monotonic() + 100
    path = folder / "out" / "predictions.jsonl"
    while time.monotonic() < limit and (not path.exists() or path.read_bytes().count(b"\n") < count):
        time.sleep(0.005)


def test_three_processes_share_the_work_and_ask_nothing_twice(tmp_path):
    prepare(tmp_path)
    for process in start(tmp_path, 3):
        assert process.wait(timeout=120) == 0
    assert sorted(lines(tmp_path)) == list(range(QUESTIONS))
    asked = [line for file in tmp_path.glob("asked.*") for line in file.read_text().splitlines()]
    assert len(asked) == len(set(asked)) == QUESTIONS
    submission = json.loads((tmp_path / "out" / "submission.json").read_text())
    assert [row["question_id"] for row in submission] == list(range(QUESTIONS))
    assert json.loads((tmp_path / "out" / "run.json").read_text())["counts"]["ranks"] == 3


def test_the_first_rank_answers_what_a_killed_one_had_begun(tmp_path):
    """No second start is needed: its claims are free the moment it dies."""
    prepare(tmp_path)
    first, second = start(tmp_path, 2)
    wait_for(tmp_path, 20)
    os.kill(second.pid, signal.SIGKILL)
    second.wait()
    assert first.wait(timeout=120) == 0
    assert sorted(lines(tmp_path)) == list(range(QUESTIONS))


def test_killed_in_one_number_of_processes_and_continued_in_another(tmp_path):
    prepare(tmp_path)
    generator = random.Random(0)
    for kill, world in enumerate((1, 3, 2, 3, 1)):
        processes = start(tmp_path, world)
        wait_for(tmp_path, 30 * (kill + 1) + generator.randrange(20))
        for process in processes:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
    assert 0 < len(lines(tmp_path)) < QUESTIONS
    for process in start(tmp_path, 2):
        assert process.wait(timeout=120) == 0
    assert sorted(lines(tmp_path)) == list(range(QUESTIONS))


def test_the_same_command_started_twice_shares_the_work(tmp_path):
    """Two terminals, both believing to be alone: no line is there twice, and both end with the whole run."""
    prepare(tmp_path)
    both = [*start(tmp_path, 1), *start(tmp_path, 1)]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert sorted(lines(tmp_path)) == list(range(QUESTIONS))
