import pytest
from PIL import Image
from scripted_engine import ScriptedEngine

from demo.chat import Turn, ask, to_messages


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "scene.png"
    Image.new("RGB", (32, 16), (250, 0, 0)).save(path)
    return str(path)


def _last(steps):
    *_, step = steps
    return step


def _texts(request):
    return [(message["role"], [part.get("text", part["type"]) for part in message["content"]] if isinstance(message["content"], list)
             else message["content"]) for message in request.messages]  # fmt: skip


def test_an_answer_grows_piece_by_piece(picture):
    steps = list(ask(ScriptedEngine(("a ", "red", " one")), (), " What? ", [picture]))
    assert [step.turns[-1].answer for step in steps] == ["", "", "a ", "a red", "a red one", "a red one"]
    assert [step.is_done for step in steps] == [False] * 5 + [True]
    assert steps[0].views is None and steps[1].views[0].visual_tokens == 12 == steps[1].visual_tokens
    assert steps[-1].turns == (Turn("What?", (picture,), "a red one"),)


def test_asking_again_tells_the_model_what_was_said_about_the_same_picture(picture):
    engine = ScriptedEngine()
    first = _last(ask(engine, (), "What colour?", [picture]))
    second = _last(ask(engine, first.turns, "Sure?", max_new_tokens=7, temperature=0.5))
    assert _texts(engine.requests[1]) == [("user", ["image", "What colour?"]), ("assistant", "red"), ("user", ["Sure?"])]
    assert engine.requests[1].messages[0]["content"][0]["image"].size == (32, 16)
    assert (engine.requests[1].max_new_tokens, engine.requests[1].temperature) == (7, 0.5)
    assert len(second.views) == 1 and len(second.turns) == 2


def test_an_instruction_is_read_under_its_question_and_stays_there(picture):
    """Without the line it was trained with a small model describes the picture instead of answering."""
    engine = ScriptedEngine()
    first = _last(ask(engine, (), "What colour?", [picture], instruction=" One word. "))
    assert first.turns[0].question == "What colour?"
    _last(ask(engine, first.turns, "Describe it."))
    assert _texts(engine.requests[1]) == [("user", ["image", "What colour?\nOne word."]), ("assistant", "red"), ("user", ["Describe it."])]


def test_text_alone_is_a_conversation_too():
    step = _last(ask(ScriptedEngine(), (), "Hello"))
    assert step.turns[-1].answer == "red" and step.views == () and step.visual_tokens == 0 and step.prompt_tokens > 0


def test_the_prompt_size_shown_is_that_of_the_request(picture):
    engine = ScriptedEngine()
    step = _last(ask(engine, (Turn("a", (picture,), "b"),), "What colour?"))
    prepared = engine.processor.prepare(engine.requests[0].messages, add_generation_prompt=True)
    assert step.prompt_tokens == len(prepared.rendered.input_ids)


def test_a_broken_picture_is_one_line_without_the_folder_and_is_not_told_again(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"\x89PNG no")
    engine = ScriptedEngine()
    step = _last(ask(engine, (), "What?", [str(broken)]))
    assert step.is_done and step.turns[0].error.startswith("broken.png is not a readable image")
    assert "\n" not in step.turns[0].error and str(tmp_path) not in step.turns[0].error and engine.requests == []
    after = _last(ask(engine, step.turns, "And now?"))
    assert after.turns[-1].answer == "red" and _texts(engine.requests[0]) == [("user", ["And now?"])]


def test_a_prompt_too_long_is_an_error_and_pictures_lose_tiles_first(picture):
    engine = ScriptedEngine()
    tokens = _last(ask(engine, (), "What?", [picture])).prompt_tokens
    engine.max_tokens = tokens - 1
    step = _last(ask(engine, (), "What?", [picture]))
    assert step.turns[-1].error is None and step.receipts and len(step.views[0].tiles) == 1
    engine.max_tokens = 10
    assert "at most 10 fit" in _last(ask(engine, (), "What?", [picture])).turns[-1].error


def test_an_error_in_the_middle_keeps_what_was_said():
    step = _last(ask(ScriptedEngine(("half", RuntimeError("out of\nmemory"))), (), "What?"))
    assert step.turns == (Turn("What?", (), "half", "out of memory"),)


def test_closing_the_conversation_stops_the_engine():
    """A browser tab closed in mid-answer must free the engine's lock for everybody else."""
    engine = ScriptedEngine(("a", "b", "c"))
    steps = ask(engine, (), "What?")
    while next(steps).turns[-1].answer != "a":
        pass
    steps.close()
    assert engine.was_stopped


def test_a_question_without_words_is_refused(picture):
    with pytest.raises(ValueError, match="no words"):
        next(ask(ScriptedEngine(), (), " \n", [picture]))


def test_what_a_user_writes_stays_text():
    messages = to_messages((Turn("<image> <tile_01>"),))
    assert messages == [{"role": "user", "content": [{"type": "text", "text": "<image> <tile_01>"}]}]
