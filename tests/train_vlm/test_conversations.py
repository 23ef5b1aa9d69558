"""LLaVA JSON: where a picture stands, and what is refused."""

import json

import pytest

from train_vlm.conversations import from_llava, read_llava


def turns(*texts):
    return [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(texts)]


IMAGE = {"type": "image"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("<image>\nWhat?", [IMAGE, {"type": "text", "text": "What?"}]),
        ("What?\n<image>", [{"type": "text", "text": "What?"}, IMAGE]),
        ("<image>", [IMAGE]),
        ("\n<image>\n What?", [IMAGE, {"type": "text", "text": " What?"}]),
        ("see <image> and <image>", [{"type": "text", "text": "see "}, IMAGE, {"type": "text", "text": " and <image>"}]),
    ],
)
def test_a_mark_becomes_a_picture_at_its_place(text, expected):
    """The line break beside the mark goes: the renderer writes its own. A mark too many is only text."""
    messages, paths = from_llava({"image": "a.png", "conversations": turns(text, "red")})
    assert messages[0] == {"role": "user", "content": expected} and paths == ["a.png"]
    assert messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "red"}]}


def test_several_pictures_over_several_turns():
    messages, paths = from_llava({"image": ["a.png", "b.png"], "conversations": turns("<image>\nWhat?", "x", "<image>\nAnd?", "y")})
    assert [part["type"] for message in messages for part in message["content"]] == ["image", "text", "text", "image", "text", "text"]
    assert paths == ["a.png", "b.png"]


def test_without_a_picture_and_in_an_answer_a_mark_is_text():
    """A sample about HTML or about this very format must not ask for a picture."""
    messages, paths = from_llava({"conversations": turns("What is <image>?", "An <image> tag.")})
    assert (
        paths == [] and messages[0]["content"][0]["text"] == "What is <image>?" and messages[1]["content"][0]["text"] == "An <image> tag."
    )


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        ({}, "no conversations"),
        ([], "no conversations"),
        ("text", "no conversations"),
        ({"conversations": []}, "no conversations"),
        ({"conversations": ["hello"]}, "expected 'from' human or gpt"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "expected 'from' human or gpt"),
        ({"conversations": [{"from": ["human"], "value": "x"}]}, "expected 'from' human or gpt"),
        ({"conversations": [{"from": "human", "value": 5}]}, "expected 'from' human or gpt"),
        ({"image": "a.png", "conversations": turns("no mark", "x")}, "1 images but 0 <image> marks"),
        ({"image": 5, "conversations": turns("<image>", "x")}, "expected a path or a list of paths"),
        ({"image": [None], "conversations": turns("<image>", "x")}, "expected a path or a list of paths"),
    ],
)
def test_a_malformed_sample_is_a_value_error(sample, message):
    """One odd sample among a million must be counted, not stop the run with another kind of error."""
    with pytest.raises(ValueError, match=message):
        from_llava(sample)


@pytest.mark.parametrize(
    ("content", "message"), [("{", "is no valid JSON"), ("", "is no valid JSON"), ("{}", "holds dict"), ("[]", "holds no samples")]
)
def test_what_is_no_llava_file_is_refused(tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_llava(tmp_path / "x.json")


def test_a_file_is_read_and_a_missing_one_named(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"conversations": turns("a", "b")}]))
    assert len(read_llava(tmp_path / "x.json")) == 1
    with pytest.raises(FileNotFoundError, match="no file at"):
        read_llava(tmp_path / "y.json")
