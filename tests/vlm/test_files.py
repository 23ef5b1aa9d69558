"""A file is there whole or not at all."""

import os

import pytest

from vlm.files import write_whole


def test_text_and_bytes_arrive_with_their_folders(tmp_path):
    assert write_whole(tmp_path / "a" / "b.txt", "Grüße\n").read_bytes() == "Grüße\n".encode()
    assert write_whole(tmp_path / "a" / "b.txt", b"\x00\xff").read_bytes() == b"\x00\xff"


def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    """A run killed while writing must not leave half a summary, nor litter."""
    path = write_whole(tmp_path / "x.json", "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        write_whole(path, "new")
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["x.json"]


def test_others_may_read_the_file(tmp_path):
    """mkstemp makes files that only their owner reads; a web server would find them closed."""
    assert write_whole(tmp_path / "x", "y").stat().st_mode & 0o777 == 0o644
