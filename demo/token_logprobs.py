"""What is told of tokens and their probabilities, in the shape of OpenAI's chat completions: text, bytes and log-probability of each.

A token need not be whole letters: of a byte-level tokenizer (Nemotron-H's, and ours) it is bytes, which a client joins to see the text.
"""

from collections.abc import Sequence

from vlm.engine import TokenLogprobs

__all__ = ["TokenWords"]

LEAST_LOGPROB = -9999.0  # JSON has no infinity; OpenAI's own stand-in for "as good as never"
# Byte-level tokenizers write each byte as a letter: printable ones of Latin-1 as they are, the others, in order, from U+0100 on.
AS_THEY_ARE = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
BYTE_OF = {chr(byte): byte for byte in AS_THEY_ARE}
BYTE_OF |= {chr(0x100 + place): byte for place, byte in enumerate(byte for byte in range(256) if byte not in set(AS_THEY_ARE))}


class TokenWords:
    """Tokens of one tokenizer in words. By any thread."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer
        self._is_byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
        # Asked for at every token, a table of a thousand added ones would be made at every token.
        self._added = {token: str(added) for token, added in tokenizer.added_tokens_decoder.items()}

    def bytes_of(self, token: int) -> bytes:
        """What the token stands for; the name of a special one."""
        if token in self._added:
            return self._added[token].encode()
        letters = self._tokenizer.convert_ids_to_tokens(token)
        if self._is_byte_level and isinstance(letters, str) and all(letter in BYTE_OF for letter in letters):
            return bytes(BYTE_OF[letter] for letter in letters)
        return self._tokenizer.decode([token]).encode()

    def _entry(self, token: int, logprob: float) -> dict:
        content = self.bytes_of(token)
        return {"token": content.decode(errors="replace"), "bytes": list(content), "logprob": max(logprob, LEAST_LOGPROB)}

    def describe(self, told: Sequence[TokenLogprobs]) -> list[dict]:
        """`choices[].logprobs.content`: [{"token", "bytes", "logprob", "top_logprobs": [{"token", "bytes", "logprob"}]}], in order."""
        return [self._entry(one.token, one.logprob) | {"top_logprobs": [self._entry(*best) for best in one.top]} for one in told]
