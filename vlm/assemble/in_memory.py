"""Assemble a model in memory: for decoders with random weights, and as the plain way beside `streaming.py`, which must give the same."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.models.nemotron_h import NemotronHForCausalLM

from vision_encoders import build_vision_encoder

from ..decoder import load_language_model, preset_config
from ..decoder.stored_weights import open_language_model
from ..modeling import VisionLanguageModel
from ..processing import VLMProcessor
from ..rendering import chat_formats
from ..small_tokenizer import train_small_tokenizer
from ..source_files import RECORD, read_source_files, record_of
from .embedding_rows import added_rows, row_blocks
from .origins import origins_of
from .parts import added_vocabulary, fresh_projector, generation_config, join_configs, join_processor, prepare_tokenizer

__all__ = ["TINY_ENCODER", "add_rows", "assemble", "corpus_texts", "encoder_request"]

TINY_ENCODER = {"name": "internvit", "image_size": 64, "patch_size": 8, "hidden_size": 128, "num_hidden_layers": 4,
                "num_attention_heads": 4, "intermediate_size": 512}  # fmt: skip
CORPUS = Path(__file__).parent.with_name("small_corpus.txt")


def assemble(
    preset: str | None = None,
    *,
    language_model: str | Path | None = None,
    vision_encoder: str | None = None,
    vision_checkpoint: str | Path | None = None,
    vision_settings: dict | None = None,
    tokenizer_corpus: Sequence[str] = (),
    tokenizer_phrases: Sequence[str] = (),
    tile_size: int | None = None,
    max_tiles: int | None = None,
    pixel_shuffle_factor: int = 2,
    seed: int = 0,
) -> tuple[VisionLanguageModel, VLMProcessor]:
    """A model with a fresh projector, and its processor. With `language_model` (a folder) the decoder and its shape come from there,
    else it has the shape of `preset` and random weights.

    Raises ValueError / FileNotFoundError for an unknown preset, a folder that is no checkpoint, or parts that do not fit.
    """
    torch.manual_seed(seed)
    small = preset == "tiny"
    source_files = {}
    if language_model:
        decoder = load_language_model(language_model)
        tokenizer, chat, _ = prepare_tokenizer(language_model, decoder.config.vocab_size)
        add_rows(decoder, added_vocabulary(tokenizer, decoder.config.vocab_size), seed=seed)
        source_files = read_source_files(language_model)
        stored = open_language_model(language_model)
        source_files[RECORD] = record_of(stored.tensors, stored.places)
    else:
        tokenizer = train_small_tokenizer(corpus_texts(tokenizer_corpus), phrases=tokenizer_phrases)
        chat = chat_formats()["small" if small else "chatml"]
        config = preset_config(preset)
        if small:
            config.vocab_size = -(-len(tokenizer) // 64) * 64
        config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, None
        config.eos_token_id = tokenizer.convert_tokens_to_ids(chat.turn_close)
        decoder = NemotronHForCausalLM(config)
    encoder = build_vision_encoder(**encoder_request(preset, vision_encoder, vision_checkpoint, vision_settings))
    config = join_configs(
        encoder, decoder.config, tokenizer, pixel_shuffle_factor=pixel_shuffle_factor, tile_size=tile_size,
        origins=origins_of(language_model, vision_checkpoint),
    )  # fmt: skip
    model = VisionLanguageModel(config, vision_encoder=encoder, language_model=decoder)
    if language_model:
        model.projector = fresh_projector(config, dtype=decoder.dtype, seed=seed)
    else:
        # Larger visual tokens beside the decoder's small random words. Chosen, not proven: 0.58 against 0.59 to 0.62 after 375 steps, in
        # runs that differed in other settings too (docs/decisions.md).
        with torch.no_grad():
            model.projector.linear_2.weight.mul_(4.0)
        model.projector.to(decoder.dtype)
    model.generation_config = generation_config(GenerationConfig.from_model_config(config), config, tokenizer, chat)
    model.source_files = source_files
    processor = join_processor(encoder, tokenizer, chat, config.visual_tokens_per_tile, max_tiles or (6 if small else 12))
    return model.eval(), processor


def encoder_request(
    preset: str | None, vision_encoder: str | None, vision_checkpoint: str | Path | None, vision_settings: dict | None
) -> dict:
    """Arguments of `build_vision_encoder`: what was asked for, or the tiny preset's own encoder."""
    if vision_encoder is None and vision_checkpoint is None and preset == "tiny":
        return TINY_ENCODER | (vision_settings or {})
    return {"name": vision_encoder or "internvit", "checkpoint": vision_checkpoint} | (vision_settings or {})


@torch.no_grad()
def add_rows(decoder: NemotronHForCausalLM, count: int, *, seed: int) -> None:
    """Give the embeddings and the output head `count` more rows (see embedding_rows.py)."""
    if not count:
        return
    tied = decoder.lm_head.weight is decoder.model.embeddings.weight
    for module, scattered in ((decoder.model.embeddings, True), (decoder.lm_head, False)):
        if tied and not scattered:
            decoder.lm_head.weight = decoder.model.embeddings.weight
            continue
        old = module.weight
        new = added_rows(row_blocks(len(old), lambda start, stop, old=old: old[start:stop]), count, scattered=scattered, seed=seed)
        module.weight = nn.Parameter(torch.cat([old, new]), requires_grad=old.requires_grad)
        module.weight._is_hf_initialized = True
    decoder.config.vocab_size += count
    decoder.vocab_size = decoder.model.embeddings.num_embeddings = decoder.lm_head.out_features = decoder.config.vocab_size


def corpus_texts(paths: Sequence[str]) -> list[str]:
    """Texts for the small tokenizer: plain files (a line each), LLaVA JSON files (a turn each), and the corpus that comes along."""
    texts = []
    for path in [*paths, CORPUS]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer corpus at {path}; expected a text file or LLaVA JSON")
        content = Path(path).read_text(encoding="utf-8")
        if str(path).endswith(".json"):
            try:
                samples = json.loads(content)
                texts += [turn["value"].replace("<image>", "") for sample in samples for turn in sample["conversations"]]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no LLaVA JSON ({error}); expected a list of {{'conversations': [...]}}") from error
        else:
            texts += content.splitlines()
    return texts
