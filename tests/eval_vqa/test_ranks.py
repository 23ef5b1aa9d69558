"""Who is who among several processes, and starting them."""

import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from eval_vqa.ranks import PARENT, Rank, start_ranks, tell, this_rank


@pytest.fixture
def environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", PARENT):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_alone_without_a_launcher(environment):
    assert this_rank() == Rank(0, 1, 0)
    assert this_rank().is_first


def test_launchers_say_it_by_environment_variables(environment):
    for name, value in (("RANK", "3"), ("WORLD_SIZE", "4"), ("LOCAL_RANK", "1")):
        environment.setenv(name, value)
    assert this_rank() == Rank(3, 4, 1)
    environment.setenv("RANK", "x")
    with pytest.raises(ValueError, match="RANK is 'x'"):
        this_rank()


def test_a_device_that_was_named_is_kept():
    assert Rank(1, 2, 1).device("cpu") == "cpu"
    assert Rank(0, 1, 0).device("cuda") == "cuda"


def test_a_gpu_is_used_where_there_is_one(monkeypatch):
    """A model of 8 billion parameters on the processor beside an idle GPU would be a day's waiting."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert Rank(0, 1, 0).device(None) == "cuda"
    assert [Rank(rank, 6, rank).device(wanted) for rank in (1, 5) for wanted in (None, "cuda")] == ["cuda:1"] * 4
    assert Rank(1, 2, 1).device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert Rank(0, 1, 0).device(None) == Rank(1, 2, 1).device(None) == "cpu"


def test_a_rank_ends_when_its_starter_is_gone():
    Rank(0, 1, 0, os.getppid()).check_parent()
    with pytest.raises(KeyboardInterrupt):
        Rank(0, 1, 0, 1_000_000).check_parent()


def script(tmp_path, text):
    path = tmp_path / "rank.py"
    path.write_text("import os, sys, time\nrank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])\n" + text)
    return [str(path)]


def test_each_rank_gets_its_number_and_threads(tmp_path):
    command = script(tmp_path, f"open({str(tmp_path)!r} + f'/{{rank}}-{{world}}', 'w').write(os.environ['OMP_NUM_THREADS'])")
    assert start_ranks(3, command) == 0
    assert sorted(path.name for path in tmp_path.glob("*-3")) == ["0-3", "1-3", "2-3"]


@pytest.mark.parametrize(("text", "code"), [("sys.exit(rank == 0)", 1), ("sys.exit(2 if rank else 0)", 2)])
def test_the_exit_code_is_the_first_ranks_or_that_of_a_failure(tmp_path, text, code):
    assert start_ranks(2, script(tmp_path, text)) == code


def test_when_one_dies_the_others_are_stopped(tmp_path):
    began = time.monotonic()
    text = "import signal\nif rank: os.kill(os.getpid(), signal.SIGKILL)\ntime.sleep(60)"
    assert start_ranks(2, script(tmp_path, text)) == 137
    assert time.monotonic() - began < 40


def test_ctrl_c_ends_the_ranks_without_a_word_from_them(tmp_path):
    """The terminal sends it to all processes of the group; only the one that started them answers."""
    path = [str(Path(__file__).parents[2])]
    command = script(tmp_path, f"open({str(tmp_path)!r} + f'/started{{rank}}', 'w').close(); time.sleep(60)")
    heard = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"  # a test run in the background is deaf to it
    code = f"import sys; {heard}; sys.path[:0] = {path!r}; from eval_vqa.ranks import start_ranks; start_ranks(2, {command!r})"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, start_new_session=True, text=True)
    limit = time.monotonic() + 60
    while len(list(tmp_path.glob("started*"))) < 2 and time.monotonic() < limit:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGINT)
    error = process.communicate(timeout=60)[1]
    assert process.returncode != 0
    assert error.count("KeyboardInterrupt") == error.count("Traceback") == 1


def test_a_line_is_one_write_even_where_nothing_is_buffered(monkeypatch):
    class Pipe(io.RawIOBase):
        written = []

        def writable(self):
            return True

        def write(self, data):
            self.written.append(bytes(data))
            return len(data)

    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(Pipe(), write_through=True))
    tell("vizwiz run: no such file")
    assert Pipe.written == [b"vizwiz run: no such file\n"]
    print("printed", file=sys.stderr)
    assert Pipe.written[1:] == [b"printed", b"\n"]  # why it is not print()
