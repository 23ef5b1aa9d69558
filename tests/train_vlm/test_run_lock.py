"""The lock on a run's folder: held by one process, gone with it, and told with its owner."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from train_vlm.run_lock import holder_of, lock_file, only_one, wait_while_held

ROOT = Path(__file__).resolve().parents[2]
HOLDER = """
import os, sys, time
from train_vlm.run_lock import only_one
with only_one(sys.argv[1]):
    child = os.fork()  # as a process that reads data: it must not hold the lock on
    if child:
        print(child, flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that has tmp_path/out, and the id of its child, which outlives it."""
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path / "out")], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    child = int(process.stdout.readline())
    yield process, child
    process.kill()
    process.wait()
    process.stdout.close()
    os.kill(child, signal.SIGKILL)


def test_a_second_run_is_refused_with_the_id_of_the_first(holder, tmp_path):
    """It would remove the checkpoint that the first one is writing, and both would replace the model."""
    with pytest.raises(ValueError, match=rf"still going on \(process {holder[0].pid}\).*kill {holder[0].pid}"):
        only_one(tmp_path / "out", wait_seconds=0.2).__enter__()


def test_a_run_on_another_machine_is_named_with_it(holder, tmp_path):
    """Its number is another process here, which nobody should be told to kill."""
    lock_file(tmp_path / "out").write_text("4711 on node-7")
    with pytest.raises(ValueError, match=r"process 4711 on node-7\); wait for it, end it, or .*crash of that machine"):
        only_one(tmp_path / "out", wait_seconds=0.2).__enter__()


def test_a_kill_frees_the_folder_at_once(holder, tmp_path):
    """A flock would be held on by forked reading processes for seconds, a file with an id in it for ever."""
    holder[0].kill()
    holder[0].wait()
    assert lock_file(tmp_path / "out").is_file()
    began = time.monotonic()
    with only_one(tmp_path / "out", wait_seconds=5):
        assert lock_file(tmp_path / "out").read_text() == f"{os.getpid()} on {socket.gethostname()}"
    assert time.monotonic() - began < 1 and not list(tmp_path.iterdir())


def test_a_dying_run_is_waited_for(holder, tmp_path):
    threading.Timer(0.5, holder[0].kill).start()
    with only_one(tmp_path / "out", wait_seconds=20):
        assert holder[0].wait(5) == -signal.SIGKILL


def test_a_file_system_without_locks_is_told_and_no_obstacle(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("train_vlm.run_lock.fcntl.lockf", refuse)
    with only_one(tmp_path / "out"):
        pass
    assert "no lock on" in capsys.readouterr().out


def test_who_has_a_folder_is_told_while_it_does(holder, tmp_path):
    """What a kill left behind names nobody."""
    assert holder_of(tmp_path / "out") == (holder[0].pid, socket.gethostname()) and holder_of(tmp_path / "other") is None
    holder[0].kill()
    holder[0].wait()
    assert lock_file(tmp_path / "out").is_file() and holder_of(tmp_path / "out") is None


def test_a_start_waits_for_a_run_that_is_ending(holder, tmp_path, capsys):
    """Its ranks may still have the port at which the new ones would meet - and meet its."""
    with pytest.raises(ValueError, match=rf"still going on \(process {holder[0].pid}\)"):
        wait_while_held(tmp_path / "out", 0.5)
    assert holder[0].poll() is None
    assert f"waiting up to 0 s for process {holder[0].pid} on {socket.gethostname()}, which still has" in capsys.readouterr().out
    threading.Timer(0.5, holder[0].kill).start()
    wait_while_held(tmp_path / "out", 60)
    assert holder[0].wait(1) == -signal.SIGKILL


def test_other_ranks_wait_without_a_word(holder, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError):
        wait_while_held(tmp_path / "out", 0.3)
    assert capsys.readouterr().out == ""
