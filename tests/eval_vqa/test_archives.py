"""Paths that lead into zip files."""

import os
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from eval_vqa.archives import exists, is_file, members, read_bytes


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("folder/x.txt", b"in")
        file.mkdir("empty")
    return path


def test_a_member_is_a_file_and_its_folder_is_there(archive):
    assert read_bytes(archive / "folder" / "x.txt") == b"in"
    assert is_file(archive / "folder" / "x.txt") and not is_file(archive / "folder")
    assert exists(archive / "folder") and not exists(archive / "fold")
    assert members(archive) == ["folder/x.txt"]


def test_a_file_on_disk_is_read_as_ever(tmp_path):
    (tmp_path / "x.txt").write_bytes(b"disk")
    assert read_bytes(tmp_path / "x.txt") == b"disk"
    with pytest.raises(FileNotFoundError, match="y.txt not found"):
        read_bytes(tmp_path / "y.txt")


def test_a_folder_called_zip_is_a_folder(tmp_path):
    (tmp_path / "b.zip").mkdir()
    (tmp_path / "b.zip" / "x").write_bytes(b"1")
    assert read_bytes(tmp_path / "b.zip" / "x") == b"1"
    assert not is_file(tmp_path / "b.zip" / "y")


def test_a_missing_member_names_the_archive(archive):
    with pytest.raises(FileNotFoundError, match="a.zip has no member 'folder/y'"):
        read_bytes(archive / "folder" / "y")


def test_a_broken_archive_holds_nothing_and_says_so(tmp_path):
    (tmp_path / "c.zip").write_bytes(b"no zip")
    assert not is_file(tmp_path / "c.zip" / "x")
    with pytest.raises(ValueError, match="download it again"):
        read_bytes(tmp_path / "c.zip" / "x")


def test_a_damaged_member_is_an_error_that_names_it(archive):
    content = bytearray(archive.read_bytes())
    content[content.index(b"in", 40)] ^= 1
    archive.write_bytes(bytes(content))
    with pytest.raises(ValueError, match="x.txt cannot be read from its archive"):
        read_bytes(archive / "folder" / "x.txt")


def test_an_archive_that_was_replaced_is_opened_again(archive):
    assert read_bytes(archive / "folder" / "x.txt") == b"in"
    with zipfile.ZipFile(archive.with_suffix(".new"), "w") as file:
        file.writestr("folder/x.txt", b"another")
    os.replace(archive.with_suffix(".new"), archive)
    assert read_bytes(archive / "folder" / "x.txt") == b"another"


def test_threads_read_one_archive_together(tmp_path):
    content = {f"{number}.jpg": bytes([number]) * 3000 for number in range(100)}
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in content.items():
            file.writestr(name, data)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda name: read_bytes(tmp_path / "a.zip" / name), [*content] * 5)
        assert list(found) == [*content.values()] * 5
