"""Assemble a model from checkpoints to a folder, from file to file: memory of a few tensors, whatever the size of the model.

1. Look: configs, tokenizer and the headers of all weight files. Everything that does not fit is found here, before a byte is written.
2. Plan: each tensor of the result, in the names of our saved folders, as a byte range of an input file (decoder, InternViT), or as
   something small that is computed (projector, added embedding rows, resized position embeddings).
3. Write: shard after shard into a temporary folder beside the target, which is renamed when all is there.

In memory at a time: the projector, the added rows, one tensor that has to be converted; open_clip and timm towers whole.
`in_memory.assemble` and `save_model` give the same folder for a machine that holds the model; a test compares them.
"""

import math
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.models.nemotron_h import NemotronHForCausalLM

from vision_encoders import open_vision_encoder
from vision_encoders.stored_tensors import StoredTensor

from ..checkpoint import replace_folder, write_settings
from ..decoder.stored_weights import EMBEDDINGS, HEAD, open_language_model
from ..golden.pack import write as write_golden_pack
from ..modeling import VisionLanguageModel
from ..shard_files import DEFAULT_SHARD_BYTES, plan_shards, write_shards
from ..source_files import RECORD, read_source_files, record_of
from .embedding_rows import added_rows, row_blocks
from .in_memory import encoder_request
from .origins import origins_of
from .parts import added_vocabulary, fresh_projector, generation_config, join_configs, join_processor, prepare_tokenizer

__all__ = ["Assembled", "assemble_folder"]


@dataclass(frozen=True)
class Assembled:
    """What was written: parameters of each part, tokens and embedding rows added, keys left out, dtype of the decoder, files and bytes."""

    folder: Path
    parameters: dict[str, int]
    added_tokens: list[str]
    vocabulary_rows: tuple[int, int]
    left_out: list[str]
    dtype: torch.dtype
    shards: int
    size_bytes: int
    visual_tokens_per_tile: int
    tile_size: int


def assemble_folder(
    out: str | Path,
    *,
    language_model: str | Path,
    preset: str | None = None,
    vision_encoder: str | None = None,
    vision_checkpoint: str | Path | None = None,
    vision_settings: dict | None = None,
    tile_size: int | None = None,
    max_tiles: int | None = None,
    pixel_shuffle_factor: int = 2,
    seed: int = 0,
    max_shard_bytes: int = DEFAULT_SHARD_BYTES,
) -> Assembled:
    """Join the decoder in folder `language_model`, an encoder and a fresh projector into the model folder `out` (replaced if it exists).

    Weights keep their dtype; the projector gets that of the embeddings. Raises ValueError / FileNotFoundError as `in_memory.assemble`,
    ValueError when the disk has too little room; nothing is then left in `out` or beside it.
    """
    torch.manual_seed(seed)
    out = Path(out)
    # 1. Look.
    decoder = open_language_model(language_model)
    rows = decoder.config.vocab_size
    tokenizer, chat, added = prepare_tokenizer(language_model, rows)
    more = added_vocabulary(tokenizer, rows)
    source_files = read_source_files(language_model)
    source_files[RECORD] = record_of(decoder.tensors, decoder.places)
    encoder, encoder_tensors = open_vision_encoder(**encoder_request(preset, vision_encoder, vision_checkpoint, vision_settings))
    decoder.config.vocab_size = rows + more
    decoder.config.dtype = decoder.dtype
    config = join_configs(
        encoder, decoder.config, tokenizer, pixel_shuffle_factor=pixel_shuffle_factor, tile_size=tile_size,
        origins=origins_of(language_model, vision_checkpoint),
    )  # fmt: skip
    processor = join_processor(encoder, tokenizer, chat, config.visual_tokens_per_tile, max_tiles or (6 if preset == "tiny" else 12))
    with torch.device("meta"):
        shadow = VisionLanguageModel(config, vision_encoder=encoder, language_model=NemotronHForCausalLM(decoder.config))
    generation = generation_config(GenerationConfig.from_model_config(config), config, tokenizer, chat)

    # 2. Plan. Order: encoder, projector, decoder.
    projector = fresh_projector(config, dtype=decoder.dtype, seed=seed)
    tensors = {f"vision_encoder.{name}": tensor for name, tensor in encoder_tensors.items()}
    tensors |= {f"projector.{name}": StoredTensor.of(tensor) for name, tensor in projector.state_dict().items()}
    for key, tensor in decoder.tensors.items():
        if key in (EMBEDDINGS, HEAD) and more:
            tensor = _with_rows(tensor, more, scattered=key == EMBEDDINGS, seed=seed)
        tensors[f"language_model.{key}"] = tensor
    plan = plan_shards(tensors, max_shard_bytes)
    size_bytes = sum(tensor.size_bytes for tensor in tensors.values())
    _check_room(out, size_bytes + sum(map(len, source_files.values())))

    # 3. Write.
    with replace_folder(out) as folder:
        write_shards(folder, tensors, plan)
        write_settings(folder, config, generation, processor, source_files, dtype=decoder.dtype)
        write_golden_pack(None, processor, folder, reason="assembled without a model in memory; python -m vlm.golden --write adds them")
    return Assembled(
        out, shadow.parameter_counts(), added, (rows, rows + more), decoder.left_out, decoder.dtype, len(plan), size_bytes,
        config.visual_tokens_per_tile, encoder.image_size,
    )  # fmt: skip


def _with_rows(tensor: StoredTensor, count: int, *, scattered: bool, seed: int) -> StoredTensor:
    def new() -> Tensor:
        blocks = row_blocks(tensor.shape[0], lambda start, stop: tensor.rows(start, stop).read())
        return added_rows(blocks, count, scattered=scattered, seed=seed)

    return StoredTensor.below(tensor, StoredTensor(tensor.dtype, (count, *tensor.shape[1:]), compute=new))


def _check_room(out: Path, needed_bytes: int) -> None:
    """Raises ValueError when the disk of `out` has too little room."""
    place = out.absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed_bytes:
        raise ValueError(f"{out} needs {math.ceil(needed_bytes / 1e6):,} MB, the disk has {free // 1_000_000:,} MB free; make room first")
