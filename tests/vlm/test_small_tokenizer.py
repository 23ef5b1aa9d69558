"""The small tokenizer: any text there and back, one word one token, special tokens of its own."""

import pytest

from vlm.rendering import Renderer, chat_formats, image_tokens
from vlm.small_tokenizer import train_small_tokenizer

TEXTS = ["red", "a red ball is left of a blue box", "how many red circles are there?"] * 4


@pytest.fixture(scope="module")
def tokenizer():
    return train_small_tokenizer(TEXTS)


@pytest.mark.parametrize("text", ["red", "Zürich 東京 🙂", "tab\tand\n\nlines", "a  b", "x\u0000y", "\u200bz"])
def test_any_text_comes_back(tokenizer, text):
    """Bytes are the alphabet: nothing is unknown."""
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_word_is_the_same_token_at_the_start_and_inside(tokenizer):
    """ "red" as an answer and " red" in a caption are one word, or a small model learns it twice."""
    (red,) = tokenizer.encode("red")
    assert red in tokenizer.encode("a red ball")


def test_special_tokens_are_single(tokenizer):
    for token in [*image_tokens(), "<|user|>", "<|assistant|>", "<|im_start|>", "<|im_end|>"]:
        assert tokenizer.encode(token, add_special_tokens=False) == [tokenizer.convert_tokens_to_ids(token)]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|im_end|>")


def test_a_phrase_is_one_token_and_stays_plain_text():
    """The instruction under every question is one token, for the renderer too, which keeps added tokens out of what a user writes."""
    tokenizer = train_small_tokenizer(list(TEXTS), phrases=["Answer with one word."])
    (index,) = tokenizer.encode("Answer with one word.", add_special_tokens=False)
    rendered = Renderer(tokenizer, chat_formats()["small"], 4).encode_plain("a red ball?\nAnswer with one word.")
    assert rendered[-1] == index and rendered.count(index) == 1
    assert "Answer with one word." in tokenizer.decode(rendered, skip_special_tokens=True)
    assert index not in train_small_tokenizer(list(TEXTS)).get_vocab().values()


def test_the_same_texts_give_the_same_tokenizer(tokenizer):
    """Two machines that train it must agree on every id."""
    assert train_small_tokenizer(list(TEXTS)).get_vocab() == tokenizer.get_vocab()


def test_a_vocabulary_too_small_for_the_bytes_is_refused():
    with pytest.raises(ValueError, match="expected at least"):
        train_small_tokenizer(TEXTS, vocabulary_size=200)
