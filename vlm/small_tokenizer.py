"""Train a byte-level BPE tokenizer on a few texts, without a download, for the small preset.

Any text can be encoded (bytes are the alphabet). A word is the same token at the start of a text and inside it (a space is put in front
and taken off again by the decoder): with few training pictures, "red" as an answer and " red" in a caption must not be two words.
Real models bring their own tokenizer; nothing here touches those.
"""

from collections.abc import Sequence
from itertools import chain

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from .rendering import chat_formats, image_tokens

__all__ = ["train_small_tokenizer"]

PAD, END_OF_TEXT = "<|pad|>", "<|endoftext|>"


def train_small_tokenizer(texts, vocabulary_size: int = 1024, phrases: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """An iterable of texts -> tokenizer with the image tokens and the marks of the chat formats "small" and "chatml" as special tokens.

    Each of `phrases` is one token: an instruction that stands under every question would else be most of what is read. Deterministic for
    the same texts in the same order. Raises ValueError when `vocabulary_size` cannot hold the bytes and special tokens.
    """
    chat = chat_formats()["small"]
    marks = dict.fromkeys([*chat.marks(), *chat_formats()["chatml"].marks()])
    special = [PAD, END_OF_TEXT, *marks, *image_tokens()]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    if vocabulary_size < len(special) + len(alphabet):
        raise ValueError(f"{vocabulary_size = }; expected at least {len(special) + len(alphabet)} for bytes and special tokens")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False, min_frequency=2
    )
    # The renderer encodes line breaks alone, with the space in front like every text: seen often, the pair becomes one token.
    tokenizer.train_from_iterator(chain(texts, ["\n"] * 1000), trainer)
    # Not special: they are plain text that is often written.
    tokenizer.add_tokens([AddedToken(phrase, normalized=False) for phrase in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=chat.turn_close,
        additional_special_tokens=[token for token in special if token not in (PAD, chat.turn_close)],
        clean_up_tokenization_spaces=False,
    )
