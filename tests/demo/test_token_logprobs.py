"""Tokens in words: exact bytes of byte-level tokenizers, whatever a letter is made of, and what other tokenizers give."""

import copy
import json

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from demo.token_logprobs import BYTE_OF, TokenWords
from vlm.engine import TokenLogprobs


@pytest.mark.parametrize("text", ["a red ball", " é\n\t", "日本 🙂", "\x00\x7f\xa0\xad"])
def test_bytes_of_tokens_join_to_the_text(tiny_processor, text):
    tokenizer = tiny_processor.tokenizer
    ids = tokenizer.encode(text, add_special_tokens=False)
    told = TokenWords(tokenizer).describe([TokenLogprobs(token, -0.5) for token in ids])
    joined = bytes(byte for entry in told for byte in entry["bytes"]).decode()
    assert joined in (text, f" {text}")  # the tokenizer puts a space before what begins without one, and takes it off again
    assert all(entry["token"] == bytes(entry["bytes"]).decode(errors="replace") for entry in told)


def test_every_byte_has_its_letter():
    """All 256, as the library that makes such tokenizers writes and reads them."""
    assert set(BYTE_OF) == set(pre_tokenizers.ByteLevel.alphabet()) and sorted(BYTE_OF.values()) == list(range(256))
    decode, letter_of = decoders.ByteLevel().decode, {byte: letter for letter, byte in BYTE_OF.items()}
    for letter in [chr(code) for code in range(128)] + ["é", "日", "🙂", "\xa0", "\xad", "ÿ"]:
        assert decode([letter_of[byte] for byte in letter.encode()]) == letter


def test_an_added_phrase_keeps_its_space(tiny_processor):
    """Decoded by itself it loses it, as the beginning of a text does."""
    tokenizer = copy.deepcopy(tiny_processor.tokenizer)
    tokenizer.add_tokens([" a phrase"])
    (token,) = tokenizer.convert_tokens_to_ids([" a phrase"])
    assert TokenWords(tokenizer).bytes_of(token) == b" a phrase"


def test_a_special_token_is_its_name(tiny_processor):
    token = tiny_processor.renderer.end_of_turn_id
    (told,) = TokenWords(tiny_processor.tokenizer).describe([TokenLogprobs(token, -1.0)])
    assert told["token"] == tiny_processor.tokenizer.convert_ids_to_tokens(token)


def test_another_tokenizer_gives_its_own_text():
    """A word piece, whose letters are no bytes."""
    backend = Tokenizer(models.WordLevel({"é": 0, "ball": 1}, unk_token="é"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    told = TokenWords(tokenizer).describe([TokenLogprobs(0, -1.0, ((1, -2.0),))])
    assert told[0]["bytes"] == list("é".encode()) and told[0]["top_logprobs"][0]["token"] == "ball"


def test_what_is_impossible_can_be_written_as_json(tiny_processor):
    (told,) = TokenWords(tiny_processor.tokenizer).describe([TokenLogprobs(5, -1.0, ((6, -float("inf")),))])
    json.dumps(told, allow_nan=False)
    assert told["top_logprobs"][0]["logprob"] == -9999.0
