"""OpenAI-style messages: images by path, by data: address or by a list beside them; text stays text; nothing is downloaded."""

import base64
import io
import json

import numpy as np
import pytest
from PIL import Image

from train_vlm.messages_files import from_messages, read_messages
from train_vlm.reading import ShardedSource
from train_vlm.shards import main

IMAGE, TEXT = {"type": "image", "image": "a.png"}, {"type": "text", "text": "What is <image>?"}


def png():
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (48, 64, 3), dtype=np.uint8)).save(file, "PNG")
    return file.getvalue()


def sample(*content, answer="red", **more):
    return {"messages": [{"role": "user", "content": list(content) if len(content) > 1 or not isinstance(content[0], str) else content[0]},
                         {"role": "assistant", "content": answer}], **more}  # fmt: skip


def test_parts_keep_their_order_and_text_stays_text():
    messages, images = from_messages(sample(TEXT, IMAGE, {"type": "image", "image": "file:///b.png"}, TEXT))
    assert messages[0]["content"] == [TEXT, {"type": "image"}, {"type": "image"}, TEXT] and images == ["a.png", "/b.png"]
    assert messages[1] == {"role": "assistant", "content": [{"type": "text", "text": "red"}]}


def test_an_address_may_carry_the_picture():
    content = base64.b64encode(png()).decode()
    for address in ({"url": f"data:image/png;base64,{content}"}, f"data:image/png;base64,{content}"):
        _, images = from_messages(sample({"type": "image_url", "image_url": address}, TEXT))
        assert images == [png()]


def test_marks_stand_for_a_list_of_images_and_for_nothing_without_one():
    messages, images = from_messages(sample("<image>\nWhich <image>?<image>", images=["a.png", "b.png"]))
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text", "image", "text"] and images == ["a.png", "b.png"]
    assert messages[0]["content"][3]["text"] == "?<image>"
    messages, images = from_messages(sample("Which <image>?"))
    assert messages[0]["content"] == [{"type": "text", "text": "Which <image>?"}] and images == []


WRONG = [
    ({"messages": []}, "no messages in the sample"),
    (sample("hi") | {"messages": [{"role": "tool", "content": "x"}]}, "expected a role of system, user, assistant"),
    (sample({"type": "image_url", "image_url": {"url": "https://a.b/c.png"}}, TEXT), "is on the net; download it"),
    (sample({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@"}}, TEXT), "is no base64"),
    (sample({"type": "image"}, TEXT), "expected a path or a data: address"),
    (sample({"type": "video", "video": "a.mp4"}, TEXT), "expected text, or an image by the user"),
    (sample(TEXT, answer=[IMAGE]), "of a message by 'assistant'; expected text"),
    (sample(TEXT, answer=None), "expected text or a list of parts"),
    (sample("no mark", images=["a.png"]), "1 images but 0 <image> marks"),
    (sample(IMAGE, TEXT, images=["a.png"]), "both a list of images and images in its messages"),
    (sample("<image>", images=[3]), "expected a list of paths"),
]


@pytest.mark.parametrize(("content", "message"), WRONG)
def test_what_is_no_sample_says_why(content, message):
    with pytest.raises(ValueError, match=message):
        from_messages(content)


def test_image_parts_without_a_source_are_those_of_the_list():
    """As TRL and the hub's data sets have it: {"type": "image"} in the turn, paths in "images"."""
    bare = {"type": "image"}
    messages, images = from_messages(sample(bare, TEXT, bare, images=["a.png", "b.png"]))
    assert [part["type"] for part in messages[0]["content"]] == ["image", "text", "image"] and images == ["a.png", "b.png"]
    with pytest.raises(ValueError, match="2 images but 1 <image> marks"):
        from_messages(sample(bare, TEXT, images=["a.png", "b.png"]))
    with pytest.raises(ValueError, match="expected a path or a data: address"):
        from_messages(sample(bare, bare, images=["a.png"]))


@pytest.mark.parametrize("key", ["image", "url", "path"])
def test_a_picture_stands_under_the_keys_that_the_model_reads(key):
    assert from_messages(sample({"type": "image", key: "a.png"}, TEXT))[1] == ["a.png"]


def test_an_embedded_picture_may_stand_in_lines():
    """MIME breaks base64 every 76 characters, and other programs keep the breaks."""
    address = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + base64.encodebytes(png()).decode()}}
    assert from_messages(sample(address, TEXT))[1] == [png()]


@pytest.mark.parametrize(
    ("text", "message"),
    [('{"messages": []}\n{', "line 2 is no valid JSON"), ("\n\n", "holds no samples"), ('{"conversations": []}', "line 1: .*; expected")],
)
def test_a_malformed_file_names_its_line(tmp_path, text, message):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_messages(tmp_path / "m.jsonl")


def test_only_a_line_feed_ends_a_line(tmp_path):
    """Text from the web holds U+2028 and U+0085, and other programs write them as they are: str.splitlines cuts there."""
    words = "one\u2028two\u0085three\u2029four"
    lines = [json.dumps(sample(words, id=name), ensure_ascii=False) for name in "ab"]
    (tmp_path / "m.jsonl").write_bytes("\r\n".join([lines[0], "", lines[1], ""]).encode())
    assert read_messages(tmp_path / "m.jsonl") == [sample(words, id="a"), sample(words, id="b")]


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file at .*m.jsonl"):
        read_messages(tmp_path / "m.jsonl")


def test_the_command_makes_shards_of_them(tmp_path, tiny_folder, capsys):
    """With a picture on disk, one in the line, two, and none; a bad one is counted by its reason."""
    (tmp_path / "a.png").write_bytes(png())
    address = {"type": "image_url", "image_url": {"url": "data:;base64," + base64.b64encode(png()).decode()}}
    bare = {"type": "image", "image": base64.b64encode(png()).decode() * 3}  # without data: before it: a name no file can have
    lines = [sample(IMAGE, TEXT, id="one"), sample(address, TEXT), sample(IMAGE, address, TEXT), sample("words alone"),
             sample({"type": "image", "image": "gone.png"}, TEXT), sample(bare, TEXT)]  # fmt: skip
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["convert", "--messages", str(tmp_path / "m.jsonl"), "--images", str(tmp_path), "--model", str(tiny_folder), "--out",
                 str(tmp_path / "out")]  # fmt: skip
    assert main(arguments) == 2 and "33.3 % of the samples are unusable" in capsys.readouterr().err
    assert main([*arguments, "--max-skipped-percent", "34"]) == 0
    assert "skipped 2 samples, image missing; first: sample m:5: image missing: gone.png" in capsys.readouterr().err
    source = ShardedSource(tmp_path / "out")
    read = [source.read(number) for number in range(4)]
    source.close()
    assert [name for name, _ in read] == ["one", "m:2", "m:3", "m:4"]
    pictures = [[part["image"] for part in messages[0]["content"] if part["type"] == "image"] for _, messages in read]
    assert [[picture.size for picture in each] for each in pictures] == [[(64, 48)], [(64, 48)], [(64, 48)] * 2, []]
