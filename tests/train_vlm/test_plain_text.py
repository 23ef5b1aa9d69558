"""Plain text as a source of a blend: whole documents cut into pieces that lose nothing, shards that read it back, and clear errors."""

import json

import pytest

from train_vlm.plain_text import cut_text, prepare_text, read_documents, text_records
from train_vlm.reading import SampleStream
from train_vlm.recipe import Source
from train_vlm.shards import convert, main
from vlm.loss import IGNORE_INDEX

PROSE = "The boat is red.\nA dog sits near the table, and nobody sees it. " * 40


def test_pieces_joined_are_the_text_and_none_is_too_long():
    """Cut in the middle of a word, or a space dropped, and the model reads text that nobody wrote."""
    pieces = cut_text(PROSE, 20, lambda text: len(text.split()) + 1)
    assert "".join(pieces) == PROSE and len(pieces) > 20
    assert all(len(piece.split()) + 1 <= 20 for piece in pieces)
    assert all(piece[-1] in " \n" for piece in pieces[:-1])


def test_text_without_a_break_is_cut_anyway():
    pieces = cut_text("x" * 1000, 30, len)
    assert "".join(pieces) == "x" * 1000 and max(map(len, pieces)) <= 30
    assert cut_text("\U0001f600", 1, lambda text: 4) == ["\U0001f600"]  # more tokens than fit: never cut inside


def test_documents_of_a_jsonl_file_are_apart(tmp_path):
    path = tmp_path / "notes.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("one", " ", "two")))
    assert read_documents(path) == [("notes:1", "one"), ("notes:3", "two")]


def test_only_a_line_feed_ends_a_document(tmp_path):
    """A document with U+2028 or U+0085 as it stands was refused as two halves of JSON."""
    path, texts = tmp_path / "web.jsonl", ["one\u2028two", "three\u0085four"]
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts), encoding="utf-8")
    assert read_documents(path) == [("web:1", texts[0]), ("web:2", texts[1])]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"words": 1}\n', "line 2"),
        ("b.jsonl", b'{"text": 3}\n', "the text is 3"),
        ("c.txt", b" \n", "holds no text"),
        ("d.txt", b"\xff\xfe", "no UTF-8"),
    ],
)
def test_a_file_that_is_no_text_is_named_with_its_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_documents(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.txt"):
        read_documents(tmp_path / "nowhere.txt")


def test_text_shards_are_read_back_word_for_word_and_all_of_it_is_supervised(tmp_path, tiny_processor):
    """From file to sample: marks of the chat format inside a text stay letters."""
    path = tmp_path / "book.txt"
    path.write_text(PROSE + "<image> <|im_end|>")
    records = text_records(path, tiny_processor, 64)
    summary = convert(records, tmp_path, tiny_processor, tmp_path / "shards")
    assert summary["samples"] == len(records) > 5 and summary["tiles"] == 0
    stream = SampleStream((Source(str(tmp_path / "shards")),), tiny_processor, seed=0, max_tokens=64)
    samples = [stream[position] for position in range(len(records))]
    texts = {sample["id"]: tiny_processor.tokenizer.decode(sample["input_ids"], skip_special_tokens=True) for sample in samples}
    assert [texts[record["id"]] for record in records] == [record["text"] for record in records]
    assert all(sample["labels"] == sample["input_ids"] and len(sample["pixels"]) == 0 for sample in samples)
    assert [stream.expected(position)["tokens"] for position in range(3)] == [len(sample["input_ids"]) for sample in samples[:3]]


def test_a_text_longer_than_the_recipe_allows_is_counted_as_too_long(tmp_path, tiny_processor):
    convert([{"id": "long", "text": PROSE}], tmp_path, tiny_processor, tmp_path / "shards")
    stream = SampleStream((Source(str(tmp_path / "shards")),), tiny_processor, seed=0, max_tokens=32)
    assert stream[0]["skipped"] == "too long" and "--text-tokens" in stream[0]["detail"]


def test_a_format_with_a_first_token_supervises_what_comes_behind_it(tiny_processor):
    prepared = prepare_text("a red ball", tiny_processor)
    bos = tiny_processor.renderer._encode_format(tiny_processor.renderer.chat_format.bos)
    assert prepared.rendered.labels[len(bos) :] == prepared.rendered.input_ids[len(bos) :]
    assert all(label == IGNORE_INDEX for label in prepared.rendered.labels[: len(bos)])


def test_the_program_writes_shards_of_text(tmp_path, tiny_folder, capsys):
    (tmp_path / "book.txt").write_text(PROSE)
    out = tmp_path / "shards"
    assert (
        main(["convert", "--text", str(tmp_path / "book.txt"), "--model", str(tiny_folder), "--out", str(out), "--text-tokens", "50"]) == 0
    )
    lines = [json.loads(line) for path in out.glob("*.index.jsonl") for line in path.read_text().splitlines()]
    assert lines and all(line["tokens"] <= 50 and line["tiles"] == [] for line in lines)
    assert main(["convert", "--llava", "x.json", "--model", str(tiny_folder), "--out", str(out)]) == 2
    assert "needs --images" in capsys.readouterr().err
