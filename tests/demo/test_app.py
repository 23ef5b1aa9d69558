import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from demo.app import find_examples, main
from demo.opening import reserve_port

APP = Path(__file__).parents[2] / "demo" / "app.py"


def _start(*arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, APP, *map(str, arguments)], capture_output=True, text=True, timeout=240, env=environment)


def _one_line(stderr):
    """Lines of ours; libraries may log before them."""
    assert "Traceback" not in stderr
    return [line for line in stderr.splitlines() if line.startswith("demo: ")]


def test_a_folder_that_is_no_checkpoint_ends_with_one_line_and_code_2(tmp_path):
    pytest.importorskip("gradio", reason="needs the demo extra")
    done = _start("--model", tmp_path, "--port", 0)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = _one_line(done.stderr)
    assert f"{tmp_path} is no model checkpoint: config.json" in line


def test_a_port_in_use_ends_with_one_line_and_code_2_before_the_model_is_read(tmp_path):
    pytest.importorskip("gradio", reason="needs the demo extra")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = _start("--model", tmp_path / "missing", "--port", port)
    assert done.returncode == 2
    assert _one_line(done.stderr) == [f"demo: port {port} on 127.0.0.1 is in use; stop the other program or give another one with --port"]


def test_a_port_that_does_not_exist_is_named():
    with pytest.raises(OSError, match="99999 is no port"):
        reserve_port("127.0.0.1", 99999)


def test_a_reserved_port_cannot_be_reserved_again():
    with reserve_port("127.0.0.1", 0) as listener, pytest.raises(OSError, match="is in use"):
        reserve_port("127.0.0.1", listener.getsockname()[1])


def test_missing_gradio_names_the_install_command(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert main(["--model", str(tmp_path)]) == 2
    assert "pip install 'nemotron-h-vision[demo]'" in capsys.readouterr().err


def test_examples_are_spread_over_the_folder(tmp_path):
    for number in range(30):
        Image.new("RGB", (4, 4)).save(tmp_path / f"{number:02d}.PNG")
    (tmp_path / "notes.txt").write_text("no picture")
    names = [Path(path).name for path in find_examples(tmp_path)]
    assert len(names) == 12 and names[:3] == ["00.PNG", "02.PNG", "05.PNG"]


def test_a_folder_without_examples_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="found no picture in"):
        find_examples(tmp_path)
    with pytest.raises(FileNotFoundError, match="no folder of examples at"):
        find_examples(tmp_path / "missing")
