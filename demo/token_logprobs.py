"""What is told of tokens and their probabilities, in the shape of OpenAI's chat completions: text, bytes and log-probability of each.

A token need not be whole letters: of a byte-level tokenizer (Nemotron-H's, and ours) it is bytes, which a client joins to see the text.
"""

from collections.abc import Callable, Sequence

from vlm.engine import TokenLogprobs

__all__ = ["describe_tokens"]

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's own stand-in for "as good as never"
# Byte-level tokenizers write each byte as a letter: printable ones of Latin-1 as they are, the others, in order, from U+0100 on.
AS_THEY_ARE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in AS_THEY_ARE}
BYTE_OF |= {chr(0x100 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in set(AS_THEY_ARE))}


def _bytes_of(tokenizer) -> Callable[[int], bytes]:
    is_byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    added = tokenizer.added_tokens_decoder

    def bytes_of(token: int) -> bytes:
        letters = tokenizer.convert_ids_to_tokens(token)
        if is_byte_level and token not in added and isinstance(letters, str) and all(letter in BYTE_OF for letter in letters):
            return bytes(BYTE_OF[letter] for letter in letters)
        return tokenizer.decode([token]).encode()

    return bytes_of


def describe_tokens(told: Sequence[TokenLogprobs], tokenizer) -> list[dict]:
    """`choices[].logprobs.content`: [{"token", "bytes", "logprob", "top_logprobs": [{"token", "bytes", "logprob"}]}], in order."""
    bytes_of = _bytes_of(tokenizer)

    def entry(token: int, logprob: float) -> dict:
        content = bytes_of(token)
        return {"token": content.decode(errors="replace"), "bytes": list(content), "logprob": max(logprob, LEAST_LOGPROB)}

    return [entry(one.token, one.logprob) | {"top_logprobs": [entry(*best) for best in one.top]} for one in told]
