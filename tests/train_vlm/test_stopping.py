"""Asking a run to end: signals, a rank that is missing, readers, and two ranks below DeepSpeed's launcher."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image

from train_vlm.shards import convert
from train_vlm.stop import main as stop
from train_vlm.stopping import StopRequest, stopped_words
from vlm.assemble import assemble
from vlm.checkpoint import save_model

ROOT = Path(__file__).resolve().parents[2]
SMALL_ENCODER = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
QUIET = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
OF_TWO = {"LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_PORT": "1"}  # as launchers tell their ranks
# A rank that is stuck as in a collective: its main thread does not come back to Python. It begins when all are there, and tells that it
# listens, and what it heard.
RANK = """
import ctypes, sys, threading, time
sys.path.insert(0, {root!r})
from train_vlm.stopping import StopRequest
import os, train_vlm.stopping
if len(sys.argv) > 2:
    train_vlm.stopping.PATIENT_SECONDS = float(sys.argv[2])
while not os.path.exists(f"{{sys.argv[1]}}.begin"):
    time.sleep(0.01)
request = StopRequest()
request.listen()
def tell():
    open(f"{{sys.argv[1]}}.listens", "w").close()
    while request.by is None:
        time.sleep(0.01)
    open(f"{{sys.argv[1]}}.heard", "w").write(request.by)
threading.Thread(target=tell, daemon=True).start()
lock = (ctypes.c_byte * 64)()
ctypes.CDLL(None).pthread_mutex_lock(lock), ctypes.CDLL(None).pthread_mutex_lock(lock)  # nobody ever unlocks it, no signal interrupts it
"""
TWO = """
import subprocess, sys
ranks = [subprocess.Popen([sys.executable, sys.argv[1], name]) for name in sys.argv[2:]]
open(sys.argv[2] + ".ranks", "w").write(" ".join(str(rank.pid) for rank in ranks))
[rank.wait() for rank in ranks]
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="launchers and signals as on Linux")


@pytest.fixture
def request_to_stop():
    own = signal.signal(signal.SIGINT, signal.default_int_handler)  # a suite in the background is started to ignore it
    request = StopRequest()
    request.is_under_way = True
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    request.listen()
    yield request
    request.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
    signal.signal(signal.SIGINT, own)
    assert signal.set_wakeup_fd(-1) == -1 and not any(thread.name == "stop request" for thread in threading.enumerate())


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_the_first_signal_is_the_reason_and_none_ends_the_process(request_to_stop, name):
    os.kill(os.getpid(), signal.Signals[name])
    os.kill(os.getpid(), signal.SIGTERM)  # a scheduler sends it to all processes, and so do launchers
    assert request_to_stop.by == name


def test_the_second_ctrl_c_ends_at_once(request_to_stop):
    os.kill(os.getpid(), signal.SIGINT)
    assert request_to_stop.by == "Ctrl-C"
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_before_the_first_step_one_is_enough(request_to_stop):
    """There is nothing to save, and a large model is read for minutes."""
    request_to_stop.is_under_way = False
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)


def test_outside_of_the_main_thread_nothing_is_listened_to():
    """Python takes handlers in the main thread only."""
    heard = []

    def in_a_thread():
        request = StopRequest()
        request.listen()
        request.close()
        heard.append(request.by)

    thread = threading.Thread(target=in_a_thread)
    thread.start()
    thread.join()
    assert heard == [None]


def test_words_say_who_was_asked_and_what_is_left():
    assert stopped_words(7, Path("m.checkpoints"), None) == (
        "asked to end (on another rank) after step 7, saved in m.checkpoints; the same command goes on from there"
    )


def kill(*processes) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
            process.wait(20)


def until(condition, seconds: float = 60.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_rank_in_a_collective_hears_and_ends_when_a_neighbour_is_gone(tmp_path):
    """A launcher's SIGTERM after a rank has died must not be answered with "after this step": it never ends, and the launcher waits half a
    minute for each of the ranks."""
    (tmp_path / "torchrun").write_text(TWO)
    (tmp_path / "rank.py").write_text(RANK.format(root=str(ROOT)))
    places = [tmp_path / "first", tmp_path / "second"]
    command = [sys.executable, tmp_path / "torchrun", tmp_path / "rank.py", *places]
    launcher = subprocess.Popen(command, env=os.environ | OF_TWO)
    until(lambda: (tmp_path / "first.ranks").is_file() and len((tmp_path / "first.ranks").read_text().split()) == 2)
    first, second = (psutil.Process(int(number)) for number in (tmp_path / "first.ranks").read_text().split())
    try:
        until(lambda: all("rank.py" in " ".join(process.cmdline()) for process in (first, second)))
        for place in places:
            place.with_suffix(".begin").touch()
        until(lambda: all(place.with_suffix(".listens").is_file() for place in places))
        second.terminate()
        until(lambda: (tmp_path / "second.heard").is_file())
        assert second.is_running() and second.status() != psutil.STATUS_ZOMBIE and not (tmp_path / "first.heard").exists()
        second.kill()
        until(lambda: second.status() == psutil.STATUS_ZOMBIE)  # its launcher is waiting for the other one
        first.terminate()
        launcher.wait(20)
        assert not first.is_running()
    finally:
        kill(launcher, first, second)


def test_a_rank_whose_neighbours_cannot_be_found_is_no_obstacle_to_a_launcher(tmp_path):
    """One that died before the others began to listen is no neighbour of theirs, and missed all the same."""
    (tmp_path / "rank.py").write_text(RANK.format(root=str(ROOT)))
    (tmp_path / "torchrun").write_text(TWO)
    (tmp_path / "alone.begin").touch()
    launcher = subprocess.Popen([sys.executable, tmp_path / "torchrun", tmp_path / "rank.py", tmp_path / "alone"],
                                env=os.environ | OF_TWO)  # fmt: skip
    until(lambda: (tmp_path / "alone.listens").is_file())
    rank = psutil.Process(int((tmp_path / "alone.ranks").read_text()))
    rank.terminate()
    try:
        launcher.wait(20)
    finally:
        kill(launcher, rank)


@pytest.mark.parametrize(("patience", "ends"), [("0", True), ("60", False)])
def test_a_second_sigterm_ends_what_does_not_come_back(tmp_path, patience, ends):
    """Unless it comes at once: a scheduler and a launcher send one each."""
    (tmp_path / "rank.py").write_text(RANK.format(root=str(ROOT)))
    (tmp_path / "alone.begin").touch()
    rank = subprocess.Popen([sys.executable, tmp_path / "rank.py", tmp_path / "alone", patience])
    try:
        until(lambda: (tmp_path / "alone.listens").is_file())
        rank.terminate()
        until(lambda: (tmp_path / "alone.heard").is_file())
        time.sleep(0.05)
        rank.terminate()
        if ends:
            assert rank.wait(20) == 128 + signal.SIGTERM
        else:
            with pytest.raises(subprocess.TimeoutExpired):
                rank.wait(1)
    finally:
        kill(rank)


def test_what_a_process_was_started_to_ignore_is_ignored():
    """A run in the background of a script: Ctrl-C is for something else."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    request = StopRequest()
    try:
        request.listen()
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.05)
        assert request.by is None
    finally:
        request.close()
        signal.signal(signal.SIGINT, before)


NOBODY_READS = """
import pathlib, sys, time
sys.path.insert(0, {root!r})
from train_vlm.run_log import RunLog, say
log = RunLog(pathlib.Path({folder!r}), 3, 'sft')
print('begun', flush=True)
time.sleep(1.0)
log.bar.mininterval = 0
for step in (1, 2, 3):
    log.advance()
    log.tell(step, {{'event': 'x', 'text': 'words'}})
say('words')
print('what others print', flush=True)
log.close()
"""


def test_output_that_nobody_reads_any_more_is_no_error(tmp_path):
    """`run 2>&1 | tee log` and Ctrl-C: tee dies of it, and the run's last words were its end."""
    code = NOBODY_READS.format(root=str(ROOT), folder=str(tmp_path / "log"))
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    while b"begun" not in process.stdout.readline():
        assert process.poll() is None
    process.stdout.close()
    assert process.wait(60) == 0
    assert (tmp_path / "log" / "log.jsonl").read_text().count("\n") == 3


@pytest.fixture
def running(tmp_path):
    """A run of two ranks below the `deepspeed` command, in its third step or further: the command, and all processes below it."""
    model, processor = assemble("tiny", vision_settings=SMALL_ENCODER, seed=0)
    save_model(model, processor, tmp_path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 60, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a red ball"}]
    convert([{"id": str(n), "image": "a.png", "conversations": turns} for n in range(8)], tmp_path, processor, tmp_path / "shards")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({
        "stage": "sft", "model": str(tmp_path / "model"), "out": str(tmp_path / "m"), "parts": {"projector": 1e-3},
        "data": {"sources": [{"shards": str(tmp_path / "shards")}], "batch_samples": 4, "workers": 1},
        "run": {"steps": 100_000, "log_every": 1, "save_every_minutes": 60, "threads_per_rank": 1},
    }))  # fmt: skip
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = str(server.getsockname()[1])
    log, own = tmp_path / "m.log" / "log.jsonl", {name: value for name, value in os.environ.items() if not name.startswith("COV")}
    processes = []
    with open(tmp_path / "said", "wb") as said:
        command = subprocess.Popen(
            [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", port, "train_vlm/sft.py", "--recipe",
             tmp_path / "recipe.yaml"], cwd=ROOT, env=own | QUIET, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
        try:
            until(lambda: command.poll() is not None or (log.is_file() and log.read_bytes().count(b"\n") >= 3), 120)
            processes += psutil.Process(command.pid).children(recursive=True)
            assert len(processes) >= 5, (tmp_path / "said").read_text()  # launcher, two ranks, their readers
            yield command, processes
        finally:
            kill(command, *processes)


def steps_of(folder) -> int:
    lines = (folder / "m.log" / "log.jsonl").read_text().splitlines()
    return json.loads(lines[-1])["step"] if lines else 0


def check_that_it_saved(folder, processes):
    """All are gone, and the newest checkpoint is of the step in which they ended."""
    _, alive = psutil.wait_procs(processes, timeout=60)
    words = (folder / "said").read_text()
    assert not alive, words
    (checkpoint,) = (folder / "m.checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert step >= 3 and f"after step {step}, saved in {folder / 'm.checkpoints'}" in words
    assert json.loads((checkpoint / "run.json").read_text())["ranks"] == 2
    assert json.loads((folder / "m.log" / "summary.json").read_text())["steps"] == step
    assert "Traceback" not in words and not (folder / "m").exists()


def test_asked_by_the_command_for_it_a_run_ends_with_code_4_and_one_that_waited_goes_on(running, tmp_path, capsys):
    """DeepSpeed's launcher passes on what its ranks end with, when nobody signals it. The second would have met the first run's ranks at
    their port, or found the port taken."""
    first, processes = running
    with open(tmp_path / "second", "wb") as said:
        second = subprocess.Popen(first.args, cwd=ROOT, env=os.environ | QUIET, stdout=said, stderr=said, start_new_session=True)
    try:
        until(lambda: "waiting up to 65 s for process" in (tmp_path / "second").read_text())
        assert stop([str(tmp_path / "m"), "--wait", "60"]) == 0 and first.wait(60) == 4
        check_that_it_saved(tmp_path, processes)
        before = steps_of(tmp_path)
        until(lambda: second.poll() is not None or steps_of(tmp_path) > before + 3)
        below = psutil.Process(second.pid).children(recursive=True)
        assert stop([str(tmp_path / "m"), "--wait", "60"]) == 0 and second.wait(60) == 4, (tmp_path / "second").read_text()
        assert "going on from" in (tmp_path / "second").read_text() and not psutil.wait_procs(below, timeout=60)[1]
        assert stop([str(tmp_path / "m")]) == 2 and "no run writes to" in capsys.readouterr().err
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(second.pid, signal.SIGKILL)
        second.wait()


def test_ranks_whose_launchers_are_signalled_save_and_end(running, tmp_path):
    """SIGTERM to all processes, as of a group: the `deepspeed` command dies of it, its launcher passes it on, and readers get it, too."""
    command, processes = running
    os.killpg(command.pid, signal.SIGTERM)
    assert command.wait(60) == -signal.SIGTERM
    check_that_it_saved(tmp_path, processes)


def test_a_run_on_another_machine_is_not_asked_here(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("train_vlm.stop.holder_of", lambda out: (os.getpid(), "node-7"))
    assert stop([str(tmp_path / "m")]) == 2 and "on node-7; give the command there" in capsys.readouterr().err
