"""Asking a run to end: signals, a rank that is missing, readers, and two ranks below DeepSpeed's launcher."""

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
from train_vlm.stopping import StopRequest, stopped_words
from vlm.assemble import assemble
from vlm.checkpoint import save_model

ROOT = Path(__file__).resolve().parents[2]
SMALL_ENCODER = {"image_size": 32, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "num_attention_heads": 2}
QUIET = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
# A rank that is stuck as in a collective: its main thread does not come back to Python. It tells that it listens, and what it heard.
RANK = """
import ctypes, sys, threading, time
sys.path.insert(0, {root!r})
from train_vlm.stopping import StopRequest
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
    request = StopRequest()
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)]
    request.listen()
    yield request
    request.close()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)] == before
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
    launcher = subprocess.Popen(
        [sys.executable, tmp_path / "torchrun", tmp_path / "rank.py", *places], env=os.environ | {"WORLD_SIZE": "2"}
    )
    until(lambda: all(place.with_suffix(".listens").is_file() for place in places))
    first, second = (psutil.Process(int(number)) for number in (tmp_path / "first.ranks").read_text().split())
    second.terminate()
    until(lambda: (tmp_path / "second.heard").is_file())
    assert (tmp_path / "second.heard").read_text() in ("", "SIGTERM") and second.is_running() and not (tmp_path / "first.heard").exists()
    second.kill()
    until(lambda: second.status() == psutil.STATUS_ZOMBIE)  # its launcher is waiting for the other one
    first.terminate()
    launcher.wait(20)
    assert not first.is_running()


def test_two_ranks_below_deepspeed_s_launcher_save_and_end(tmp_path):
    """SIGTERM to all processes of a job, as Slurm sends it: the `deepspeed` command dies of it, its launcher passes it on, and readers
    get it, too."""
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
    with open(tmp_path / "said", "wb") as said:
        command = subprocess.Popen(
            [Path(sys.executable).with_name("deepspeed"), "--num_gpus", "2", "--master_port", port, "train_vlm/sft.py", "--recipe",
             tmp_path / "recipe.yaml"], cwd=ROOT, env=own | QUIET, stdout=said, stderr=said, start_new_session=True,
        )  # fmt: skip
        until(lambda: command.poll() is not None or (log.is_file() and log.read_bytes().count(b"\n") >= 3), 120)
        processes = psutil.Process(command.pid).children(recursive=True)
        os.killpg(command.pid, signal.SIGTERM)
        command.wait()
        _, alive = psutil.wait_procs(processes, timeout=60)
    words = (tmp_path / "said").read_text()
    assert not alive and len(processes) >= 5, words  # launcher, two ranks, their readers
    (checkpoint,) = (tmp_path / "m.checkpoints").iterdir()
    step = int(checkpoint.name.removeprefix("step-"))
    assert step >= 3 and f"after step {step}, saved in {tmp_path / 'm.checkpoints'}" in words
    assert json.loads((checkpoint / "run.json").read_text())["ranks"] == 2
    assert json.loads((tmp_path / "m.log" / "summary.json").read_text())["steps"] == step
    assert "Traceback" not in words and not (tmp_path / "m").exists()
