"""What joins the parts of a model, whether they are in memory or on disk: tokenizer, chat format, configuration, processor, projector.

Both ways of assembling (in_memory.py, streaming.py) go through these functions, so that they give the same folder.
"""

from pathlib import Path

import torch
from transformers import AutoTokenizer, GenerationConfig, NemotronHConfig

from projector import Projector
from vision_encoders import VisionEncoder

from ..chat_templates import reasoning_chat_format
from ..configuration import VisionEncoderConfig, VLMConfig
from ..processing import VLMImageProcessor, VLMProcessor
from ..rendering import ChatFormat, chat_formats, image_tokens
from .embedding_rows import padded_rows

__all__ = ["added_vocabulary", "fresh_projector", "generation_config", "join_configs", "join_processor", "prepare_tokenizer"]

PAD = "<SPECIAL_233>"  # NVIDIA's choice for this family, where its tokenizer names none
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json")


def prepare_tokenizer(language_model: str | Path, vocabulary_rows: int):
    """(tokenizer of a decoder's folder with the tokens of images and chat added, its chat format, the tokens added).

    A reasoning checkpoint keeps its own marks and thinking switch; others get NVIDIA's format for this family where the tokenizer has
    its marks, else ChatML. Raises FileNotFoundError without a tokenizer, ValueError for one that does not belong to the embeddings or
    lacks tokens that cannot be added.
    """
    if not any((Path(language_model) / name).is_file() for name in TOKENIZER_FILES):
        raise FileNotFoundError(f"{language_model} has no tokenizer ({', '.join(TOKENIZER_FILES)}); put the model's own beside its weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(language_model)
    except Exception as error:  # tokenizers raises plain Exception for a file it cannot parse
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"the tokenizer in {language_model} cannot be opened ({reason}); download its files again") from error
    vocabulary = tokenizer.get_vocab()
    if not vocabulary or max(vocabulary.values()) >= vocabulary_rows:
        raise ValueError(
            f"the tokenizer in {language_model} has ids up to {max(vocabulary.values(), default=-1)}, the embeddings have "
            f"{vocabulary_rows} rows; it belongs to another model"
        )
    chat = reasoning_chat_format(tokenizer) or chat_formats()["nemotron" if "<SPECIAL_14>" in vocabulary else "chatml"]
    if chat.bos and chat.bos not in vocabulary:
        raise ValueError(
            f"the tokenizer in {language_model} lacks {chat.bos!r}, with which its chat format begins; take this checkpoint's own"
        )
    added = [token for token in [*chat.marks(), *image_tokens()] if token not in vocabulary]
    marks = [mark for mark in chat.marks() if mark in added]
    tokenizer.add_special_tokens({"additional_special_tokens": [*marks, *image_tokens()]}, replace_extra_special_tokens=False)
    if tokenizer.pad_token is None and PAD in vocabulary:
        tokenizer.pad_token = PAD
    return tokenizer, chat, added


def added_vocabulary(tokenizer, vocabulary_rows: int) -> int:
    """Rows to add to embeddings of `vocabulary_rows` rows for this tokenizer."""
    largest = max(tokenizer.get_vocab().values()) + 1
    return padded_rows(largest) - vocabulary_rows if largest > vocabulary_rows else 0


def join_configs(
    encoder: VisionEncoder,
    decoder: NemotronHConfig,
    tokenizer,
    *,
    pixel_shuffle_factor: int,
    tile_size: int | None = None,
    origins: dict | None = None,
) -> VLMConfig:
    """The configuration of the joined model. Raises ValueError for a tile size or shuffle factor that does not fit the encoder."""
    grid = encoder.image_size // encoder.patch_size
    if pixel_shuffle_factor < 1 or grid % pixel_shuffle_factor:
        raise ValueError(f"a tile has {grid} x {grid} features, which a pixel shuffle of {pixel_shuffle_factor} does not divide")
    if tile_size is not None and tile_size != encoder.image_size:
        raise ValueError(
            f"{tile_size = }, but the encoder reads tiles of {encoder.image_size} px; give it --vision-setting image_size={tile_size}"
        )
    decoder._name_or_path = ""  # a path of this machine
    return VLMConfig(
        vision_config=VisionEncoderConfig(
            encoder=encoder.encoder_settings, hidden_size=encoder.hidden_size, image_size=encoder.image_size, patch_size=encoder.patch_size
        ),
        text_config=decoder,
        projector_hidden_size=decoder.intermediate_size,
        pixel_shuffle_factor=pixel_shuffle_factor,
        image_token_id=tokenizer.convert_tokens_to_ids(image_tokens()[0]),
        visual_tokens_per_tile=(grid // pixel_shuffle_factor) ** 2,
        origins=origins,
    )


def join_processor(encoder: VisionEncoder, tokenizer, chat: ChatFormat, visual_tokens_per_tile: int, max_tiles: int) -> VLMProcessor:
    """The processor of the joined model. Raises ValueError when the tokenizer lacks a token it needs."""
    images = VLMImageProcessor(
        tile_size=encoder.image_size, max_tiles=max_tiles, image_mean=list(encoder.mean), image_std=list(encoder.std)
    )
    return VLMProcessor(images, tokenizer, chat_format=chat, visual_tokens_per_tile=visual_tokens_per_tile)


def generation_config(generation: GenerationConfig, config: VLMConfig, tokenizer, chat: ChatFormat) -> GenerationConfig:
    """`generation` with the end of turn, padding, and the placeholder forbidden (in an answer it would have no tile)."""
    generation.eos_token_id = tokenizer.convert_tokens_to_ids(chat.turn_close)
    generation.pad_token_id = tokenizer.pad_token_id
    generation.suppress_tokens = [config.image_token_id]
    return generation


def fresh_projector(config: VLMConfig, *, dtype: torch.dtype, seed: int) -> Projector:
    """A projector with random weights, the same for the same seed, whatever was drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        projector = Projector(
            config.vision_config.hidden_size,
            config.projector_hidden_size,
            config.text_config.hidden_size,
            pixel_shuffle_factor=config.pixel_shuffle_factor,
            activation=config.projector_activation,
        )
    return projector.to(dtype)
