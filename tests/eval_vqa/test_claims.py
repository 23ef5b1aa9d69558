"""Claims between real processes: POSIX locks belong to a process, so threads and handles of one prove nothing."""

import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

from eval_vqa.claims import Claims

ROOT = Path(__file__).parents[2]
OTHER = """
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
from eval_vqa.claims import Claims
claims = Claims(Path({out!r}))
claims.join()
print(claims.alone, *(claims.claim(image) for image in {images}), flush=True)
for line in sys.stdin:
    if line.startswith("release"):
        claims.release(int(line.split()[1]))
        print("released", flush=True)
"""


@contextmanager
def other_process(out, images):
    """Another process that claims `images` and holds them; yields it and what it found."""
    code = OTHER.format(root=str(ROOT), out=str(out), images=images)
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        yield process, process.stdout.readline().split()
    finally:
        process.kill()
        process.wait()
        process.stdin.close()
        process.stdout.close()


@contextmanager
def joined(out):
    with Claims(out) as claims:
        claims.join()
        yield claims


def test_an_image_is_one_processs_until_it_lets_go(tmp_path):
    with joined(tmp_path) as claims, other_process(tmp_path, [0, 1]) as (process, found):
        assert found == ["False", "True", "True"]
        assert [claims.claim(image) for image in (0, 1, 2)] == [False, False, True]
        process.stdin.write("release 1\n")
        process.stdin.flush()
        assert process.stdout.readline() == "released\n"
        assert [claims.claim(image) for image in (0, 1)] == [False, True]


def test_a_killed_process_holds_nothing(tmp_path):
    """The kernel lets go for it: no stale claim, no waiting for a time limit."""
    with joined(tmp_path) as claims, other_process(tmp_path, [0]) as (process, _):
        assert not claims.claim(0)
        process.kill()
        process.wait()
        assert claims.claim(0)


def test_waiting_ends_when_the_holder_dies(tmp_path):
    with joined(tmp_path) as claims, other_process(tmp_path, [0]) as (process, _):
        killer = subprocess.Popen(["/bin/sh", "-c", f"sleep 0.2; kill -9 {process.pid}"])
        assert claims.claim(0, wait=True)
        assert killer.wait(timeout=60) == 0


def test_only_the_first_of_several_finds_itself_alone(tmp_path):
    with Claims(tmp_path) as first:
        assert first.alone
        first.join()
        with other_process(tmp_path, []) as (_, found):
            assert found == ["False"]
    with other_process(tmp_path, []) as (_, found):
        assert found == ["True"]
        with Claims(tmp_path) as later:
            assert not later.alone


def test_nobody_joins_while_one_is_alone_and_tidies_up(tmp_path):
    """Between Claims() and join() the file may be rewritten: others wait for that long, and no longer."""
    with Claims(tmp_path) as claims:
        code = OTHER.format(root=str(ROOT), out=str(tmp_path), images=[0])
        process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(timeout=0.5)
        claims.join()
        assert process.communicate(timeout=60)[0] == "False True\n"


def test_a_claim_is_none_for_its_own_process(tmp_path):
    with Claims(tmp_path) as claims:
        assert claims.claim(3) and claims.claim(3)


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("eval_vqa.claims.fcntl.lockf", refuse)
    with pytest.raises(OSError, match="file system with file locks"):
        Claims(tmp_path)
