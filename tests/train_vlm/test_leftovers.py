"""What kills leave on disk goes at the next start; nothing else does."""

import pytest

from train_vlm.leftovers import remove_leftovers
from vlm.checkpoint import replace_folder
from vlm.files import write_whole


class Killed(BaseException):
    """Stands for kill -9: nothing is cleared away."""


@pytest.fixture
def out(tmp_path):
    """A finished model with its log and one checkpoint, and another run whose name begins alike."""
    for name in ("model", "model.log", "model.checkpoints/step-00000004", "model.early", ".model.early.abcd1234.partial"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "file").write_text("kept")
    return tmp_path / "model"


def names(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


def test_half_written_folders_and_damaged_checkpoints_are_removed_with_a_line(out, monkeypatch, capsys):
    """A full disk after ten kills in the last save of a large model."""
    before = names(out.parent)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    monkeypatch.setattr("pathlib.Path.unlink", lambda *_, **__: None)
    for target in (out, out.with_name("model.adapter")):
        with pytest.raises(Killed), replace_folder(target) as temporary:
            (temporary / "weights").write_bytes(b"x" * 2**20)
            raise Killed
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(Killed))
    with pytest.raises(Killed):
        write_whole(out / "training.json", "{}")
    monkeypatch.undo()
    for left in ("model.checkpoints/step-00000002.damaged/engine", "model.checkpoints/.step-00000006.partial", ".model.old"):
        (out.parent / left).mkdir(parents=True)
    remove_leftovers(out)
    assert names(out.parent) == before
    (line,) = capsys.readouterr().out.splitlines()
    assert "step-00000002.damaged" in line and "(2.0 MB)" in line
    remove_leftovers(out)
    assert not capsys.readouterr().out


def test_a_model_that_was_moved_aside_and_not_replaced_comes_back(out):
    """Killed between the two renames of a replacement: the hidden folder is the only whole model there is."""
    out.rename(out.with_name(".model.old"))
    remove_leftovers(out)
    assert (out / "file").read_text() == "kept" and not out.with_name(".model.old").exists()


def test_nothing_there_is_no_fault(tmp_path, capsys):
    remove_leftovers(tmp_path / "nowhere" / "model")
    assert not capsys.readouterr().out
