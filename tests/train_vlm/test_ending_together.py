"""What a killed program started does not go on: steps of the quickstart, and ranks below their launchers."""

import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from train_vlm.ending_together import end_with_launchers

ROOT = Path(__file__).resolve().parents[2]
RANK = """
import sys, os, time
sys.path.insert(0, {root!r})
from train_vlm.ending_together import end_with_launchers
end_with_launchers()
open(sys.argv[1], "w").write(str(os.getpid()))
time.sleep(60)
"""
LAUNCHER = "import subprocess, sys; sys.exit(subprocess.Popen([sys.executable, *sys.argv[1:]]).wait())"
QUICKSTART = """
import sys
from pathlib import Path
from train_vlm.quickstart_steps import Step, run_steps
run_steps([Step("step", (tuple(sys.argv[2:]),), (Path(sys.argv[1]) / "never",))], Path(sys.argv[1]))
"""

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="processes are tied to their parents on Linux only")


@pytest.fixture
def scripts(tmp_path):
    """Stand-ins by the names that launchers have: a program that starts another one, and a rank that writes its id and sleeps."""
    for name in ("deepspeed", "torchrun", "someone"):
        (tmp_path / name).write_text(LAUNCHER)
    (tmp_path / "rank.py").write_text(RANK.format(root=str(ROOT)))
    return {path.name: str(path) for path in tmp_path.iterdir()}


def started(command: list[str], told: Path) -> tuple[subprocess.Popen, psutil.Process]:
    """The first process of a chain, and the one at its end, which has written its id into `told`."""
    first = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (told.is_file() and told.read_text()):
        assert first.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    return first, psutil.Process(int(told.read_text()))


def is_gone(process: psutil.Process, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_rank_ends_with_the_launcher_of_its_launcher(scripts, tmp_path):
    """kill -9 of the command that a user typed left the ranks training, and the same command began a second run beside them."""
    first, rank = started([sys.executable, scripts["deepspeed"], scripts["torchrun"], scripts["rank.py"], str(tmp_path / "id")],
                          tmp_path / "id")  # fmt: skip
    middle = rank.parent()
    first.kill()
    first.wait()
    assert is_gone(rank, 10)
    assert is_gone(middle, 10)


def test_a_rank_goes_on_without_its_shell(scripts, tmp_path):
    """Closing a terminal must not end a run of days."""
    first, rank = started([sys.executable, scripts["someone"], scripts["rank.py"], str(tmp_path / "id")], tmp_path / "id")
    first.kill()
    first.wait()
    assert not is_gone(rank, 1.5)
    rank.kill()


def test_a_step_ends_with_the_quickstart(scripts, tmp_path):
    """Tied by the kernel, whatever the step's program is."""
    sleeper = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); time.sleep(60)"
    first, step = started([sys.executable, "-c", QUICKSTART, str(tmp_path), sys.executable, "-c", sleeper, str(tmp_path / "id")],
                          tmp_path / "id")  # fmt: skip
    first.kill()
    first.wait()
    assert is_gone(step, 10)


def test_ranks_of_a_step_end_with_the_quickstart(scripts, tmp_path):
    """Below a launcher that ties nothing, they know the quickstart by its id."""
    first, rank = started([sys.executable, "-c", QUICKSTART, str(tmp_path), sys.executable, scripts["someone"], scripts["rank.py"],
                           str(tmp_path / "id")], tmp_path / "id")  # fmt: skip
    first.kill()
    first.wait()
    assert is_gone(rank, 10)


def test_without_psutil_a_rank_ties_itself_to_nobody(monkeypatch):
    """DeepSpeed brings psutil; without both a --dry-run, which needs neither, ended with a traceback."""
    monkeypatch.setitem(sys.modules, "psutil", None)
    end_with_launchers()
