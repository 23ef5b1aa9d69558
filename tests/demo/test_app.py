import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from scripted_engine import ScriptedEngine

from demo.app import build_page, chat_messages, check_port, find_examples, main
from demo.chat import Turn

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
    done = _start("--model", tmp_path, "--port", _free_port())
    assert done.returncode == 2 and done.stdout == ""
    (line,) = _one_line(done.stderr)
    assert f"{tmp_path} is no model checkpoint: config.json" in line


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


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
    with pytest.raises(OSError, match="cannot listen on 127.0.0.1:99999"):
        check_port("127.0.0.1", 99999)


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


def test_a_turn_is_shown_letter_by_letter():
    question, answer = chat_messages((Turn("<image> *a* `b`", ("x.png",), "<b>1</b> `a<b`"),))
    assert question == {"role": "user", "content": [{"path": "x.png"}, "&lt;image&gt; \\*a\\* \\`b\\`"]}
    assert answer["content"] == "&lt;b&gt;1&lt;/b&gt; `a<b`"


def test_a_failed_turn_names_its_picture_and_its_error():
    question, answer = chat_messages((Turn("What?", ("/x/broken.png",), "", "broken.png is not readable"),))
    assert question["content"][0] == "[broken\\.png]" and answer["content"] == "**No answer:** broken\\.png is not readable"


def test_an_answer_that_has_not_begun_shows_that_it_is_awaited():
    assert chat_messages((Turn("a"),), is_done=False)[1]["content"] == "…"
    assert "without a word" in chat_messages((Turn("a"),))[1]["content"]


@pytest.fixture
def page(tmp_path):
    pytest.importorskip("gradio", reason="needs the demo extra")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    return build_page(ScriptedEngine(), "small", [str(tmp_path / "a.png")])


def test_the_page_builds_and_takes_nothing_from_the_network(page):
    blocks, options = page
    assert {block.get_block_name() for block in blocks.blocks.values()} >= {"chatbot", "multimodaltextbox", "gallery", "slider", "html"}
    assert options["theme"]._stylesheets == [] and "http" not in options["css"]
    assert not blocks.analytics_enabled and "googleapis" not in json.dumps(blocks.get_config_file(), default=str)


def test_the_page_answers_and_remembers(page, tmp_path):
    blocks, _ = page
    ask = next(function.fn for function in blocks.fns.values() if function.api_name == "ask")
    *_, (messages, turns, tiles, status, box) = ask({"text": "What?", "files": [str(tmp_path / "a.png")]}, (), 5, 0.0)
    assert messages[-1] == {"role": "assistant", "content": "red"} and turns[0].answer == "red"
    assert "1 tile" not in tiles and "one tile" in tiles and "4 of them visual" in status
    *_, (messages, turns, *_) = ask({"text": "And?", "files": []}, turns, 5, 0.0)
    assert len(messages) == 4 and len(turns) == 2
