import asyncio
import json
from dataclasses import replace

import pytest
from PIL import Image
from scripted_engine import ScriptedEngine

from demo.chat import Turn
from demo.page import build_page, chat_messages


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


def test_thoughts_fold_away_in_front_of_the_answer():
    _, thoughts, answer = chat_messages((Turn("a", answer="<think>is it *red*</think>Blue."),))
    assert thoughts == {"role": "assistant", "content": "is it \\*red\\*", "metadata": {"title": "Thoughts", "status": "done"}}
    assert answer == {"role": "assistant", "content": "Blue."}
    _, thoughts, answer = chat_messages((Turn("a", answer="<think>is it"),), is_done=False)
    assert (thoughts["content"], thoughts["metadata"]["status"], answer["content"]) == ("is it", "pending", "…")
    assert "no answer behind its thoughts" in chat_messages((Turn("a", answer="<think>is it"),))[2]["content"]


@pytest.fixture
def engine():
    return ScriptedEngine()


@pytest.fixture
def page(engine, tmp_path, monkeypatch):
    pytest.importorskip("gradio", reason="needs the demo extra")
    Image.new("RGB", (16, 16)).save(tmp_path / "a.png")
    made, new_event_loop = [], asyncio.new_event_loop
    monkeypatch.setattr(asyncio, "new_event_loop", lambda: made.append(new_event_loop()) or made[-1])
    yield build_page(engine, "small", [str(tmp_path / "a.png")], "One word.")
    for loop in made:  # gradio opens one for each of its locks and forgets them
        loop.close()
    asyncio.set_event_loop(None)


def test_what_stands_in_the_settings_is_read_under_the_question_and_not_shown(page, engine):
    """A small model without the line it was trained with describes the picture instead of answering."""
    blocks, _ = page
    setting = next(block for block in blocks.blocks.values() if getattr(block, "label", None) == "Added under every question")
    asking = next(function for function in blocks.fns.values() if function.api_name == "ask")
    assert setting.value == "One word." and setting in asking.inputs
    *_, (messages, *_) = asking.fn({"text": "What?", "files": []}, (), 5, 0.0, setting.value)
    assert engine.requests[0].messages[-1]["content"][-1]["text"] == "What?\nOne word."
    assert messages[0]["content"] == ["What?"]


def test_the_page_builds_and_takes_nothing_from_the_network(page):
    blocks, options = page
    assert {block.get_block_name() for block in blocks.blocks.values()} >= {"chatbot", "multimodaltextbox", "gallery", "slider", "html"}
    assert options["theme"]._stylesheets == [] and "http" not in options["css"]
    assert not blocks.analytics_enabled and "googleapis" not in json.dumps(blocks.get_config_file(), default=str)


def test_visitors_do_not_wait_for_each_others_answers(page):
    """The engine decodes them together; with a limit of 1 the second saw nothing until the first had all of its answer."""
    blocks, _ = page
    assert next(function for function in blocks.fns.values() if function.api_name == "ask").concurrency_limit == 16


def test_the_page_answers_and_remembers(page, tmp_path):
    blocks, _ = page
    ask = next(function.fn for function in blocks.fns.values() if function.api_name == "ask")
    *_, (messages, turns, tiles, status, box) = ask({"text": "What?", "files": [str(tmp_path / "a.png")]}, (), 5, 0.0)
    assert messages[-1] == {"role": "assistant", "content": "red"} and turns[0].answer == "red"
    assert "1 tile" not in tiles and "one tile" in tiles and "4 of them visual" in status
    *_, (messages, turns, *_) = ask({"text": "And?", "files": []}, turns, 5, 0.0)
    assert len(messages) == 4 and len(turns) == 2


def test_only_a_reasoning_checkpoint_has_the_switch_and_it_reaches_the_engine(page, engine):
    def switch(blocks):
        return next(block for block in blocks.blocks.values() if getattr(block, "label", None) == "Think before the answer")

    def ask(blocks, *settings):
        asking = next(function for function in blocks.fns.values() if function.api_name == "ask")
        *_, last = asking.fn({"text": "What?", "files": []}, (), 5, 0.0, "", *settings)
        return last

    assert not switch(page[0]).visible
    ask(page[0], True)
    assert engine.requests[-1].thinking is None  # which the renderer would refuse otherwise

    engine.processor.renderer.chat_format = replace(engine.processor.renderer.chat_format, think_open="<think>", thinks=True)
    blocks, _ = build_page(engine, "small")
    assert switch(blocks).visible and switch(blocks).value is True
    for thinking in (True, False):
        ask(blocks, thinking)
        assert engine.requests[-1].thinking is thinking
