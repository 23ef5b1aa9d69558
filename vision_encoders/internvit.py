"""InternViT over transformers' InternVLVisionModel, from OpenGVLab's own checkpoints or transformers'.

The original format packs q, k and v into one matrix and names everything differently; the arithmetic is the same, so its weights are
renamed and split, never recomputed. Features are the output of the **last** layer, without the class token. The published models have
no norm after it: transformers applies one only when the config says `use_mean_pooling: false`, and then it belongs to that checkpoint.

One correction: transformers gives the query and key norms their default epsilon; the original uses `layer_norm_eps` for them too.
"""

import dataclasses
import math
from collections.abc import Iterator
from difflib import get_close_matches
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from vision_encoders.checkpoint_files import assign_weights, find_weight_files, raise_on_shape_mismatch, read_json
from vision_encoders.contract import IMAGENET_MEAN, IMAGENET_STD, VisionEncoder, mark_initialized, settled_dtype
from vision_encoders.internvit_inference import can_run_in_place, features_in_place
from vision_encoders.position_embedding import resize_position_embedding
from vision_encoders.stored_tensors import StoredTensor, stored_tensors

__all__ = ["InternViT", "build_internvit", "open_internvit"]

# original config field -> (field of InternVLVisionConfig, the original's default)
ORIGINAL_FIELDS = {
    "num_channels": ("num_channels", 3),
    "patch_size": ("patch_size", 14),
    "image_size": ("image_size", 224),
    "qkv_bias": ("attention_bias", False),
    "hidden_size": ("hidden_size", 3200),
    "num_attention_heads": ("num_attention_heads", 25),
    "intermediate_size": ("intermediate_size", 12800),
    "qk_normalization": ("use_qk_norm", True),
    "num_hidden_layers": ("num_hidden_layers", 48),
    "hidden_act": ("hidden_act", "gelu"),
    "norm_type": ("norm_type", "rms_norm"),
    "layer_norm_eps": ("layer_norm_eps", 1e-6),
    "attention_dropout": ("attention_dropout", 0.0),
    "dropout": ("projection_dropout", 0.0),
    "initializer_range": ("initializer_range", 0.02),
    "initializer_factor": ("layer_scale_init_value", 0.1),
}
ORIGINAL_KEYS = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.patch_embedding.weight": "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
    "embeddings.position_embedding": "embeddings.position_embeddings",
}
ORIGINAL_LAYER_KEYS = {
    "attn.proj.": "attention.projection_layer.",
    "attn.q_norm.": "attention.q_norm.",
    "attn.k_norm.": "attention.k_norm.",
    "norm1.": "layernorm_before.",
    "norm2.": "layernorm_after.",
    "mlp.": "mlp.",
    "ls1": "lambda_1",
    "ls2": "lambda_2",
}
# In a whole vision-language model (InternVL's own format, transformers') the encoder's keys have a prefix; other parts are not ours.
ENCODER_PREFIXES = ("vision_model.", "model.vision_tower.", "vision_tower.")
OTHER_PARTS = ("language_model.", "model.language_model.", "lm_head.", "mlp1.", "multi_modal_projector.", "model.multi_modal_projector.")
POSITION_KEY = "embeddings.position_embeddings"


class InternViT(VisionEncoder):
    """Features of the last layer, class token dropped."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """N 3 H W -> N P C."""
        return self.tower(pixel_values).last_hidden_state[:, 1:]  # N 1+P C -> N P C

    def inference_features(self, pixel_values: Tensor) -> Tensor:
        """As `features`; on a processor in place (internvit_inference.py)."""
        if not can_run_in_place(self.tower):
            return self.features(pixel_values)
        return features_in_place(self.tower, pixel_values)[:, 1:]


def build_internvit(model: str, checkpoint: Path | None, settings: dict) -> InternViT:
    """Build InternViT; `model` is unused (the family has one architecture). See `build_vision_encoder`."""
    encoder, tensors = open_internvit(model, checkpoint, settings)
    if tensors is not None:
        loaded = ((name.removeprefix("tower."), tensor.read()) for name, tensor in tensors.items())
        assign_weights(encoder.tower, loaded, source=checkpoint)
        mark_initialized(encoder)
    return encoder


def open_internvit(model: str, checkpoint: Path | None, settings: dict) -> tuple[InternViT, dict[str, StoredTensor] | None]:
    """The encoder on the meta device and where each of its weights stands; without a checkpoint the random encoder and None."""
    from transformers import InternVLVisionConfig, InternVLVisionModel

    settings = dict(settings)
    mean, std = settings.pop("mean", None), settings.pop("std", None)
    known = {field.name for field in dataclasses.fields(InternVLVisionConfig)} | {"attn_implementation"}
    for name in settings:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ValueError(f"unknown setting {name!r} for 'internvit'" + (f"; did you mean {near[0]!r}?" if near else ""))

    # 1. The shape: the checkpoint's config, or settings over the shape of InternViT-300M.
    if checkpoint is None:
        shape = {"attention_bias": True} | settings
    else:
        shape = _read_shape(checkpoint, known)
        for name, value in settings.items():
            if name not in ("image_size", "attn_implementation") and shape.get(name, value) != value:
                raise ValueError(f"setting {name}={value!r} contradicts {checkpoint}, which has {shape[name]!r}; leave the setting out.")
        stored_mean, stored_std = _read_normalisation(checkpoint)
        mean, std = mean or stored_mean, std or stored_std
        shape |= settings
    config = InternVLVisionConfig(**shape)
    image_size, patch_size = _square(config.image_size, "image_size"), _square(config.patch_size, "patch_size")

    # 2. The weights: looked up, not read; everything is checked here.
    tensors = None
    if checkpoint is None:
        tower = InternVLVisionModel(config)
    else:
        with torch.device("meta"):
            tower = InternVLVisionModel(config)
        tensors = dict(_fit_positions(_translate(stored_tensors(find_weight_files(checkpoint))), image_size // patch_size))
        raise_on_shape_mismatch(tower, tensors, source=checkpoint)
        dtype = settled_dtype((tensor.dtype, math.prod(tensor.shape)) for tensor in tensors.values())
        tower.to(dtype)
        tensors = {f"tower.{name}": tensor.to(dtype) for name, tensor in tensors.items()}
    if config.use_qk_norm:
        for layer in tower.encoder.layer:
            layer.attention.q_norm.variance_epsilon = config.layer_norm_eps
            layer.attention.k_norm.variance_epsilon = config.layer_norm_eps

    encoder_settings = {"name": "internvit", "image_size": image_size, "patch_size": patch_size}
    for field in dataclasses.fields(InternVLVisionConfig):
        if field.name in InternVLVisionConfig.__dict__.get("__annotations__", {}) and field.name not in encoder_settings:
            encoder_settings[field.name] = getattr(config, field.name)
    encoder = InternViT(
        tower,
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=config.hidden_size,
        mean=mean or IMAGENET_MEAN,
        std=std or IMAGENET_STD,
        encoder_settings=encoder_settings,
    )
    return encoder, tensors


def _read_shape(checkpoint: Path, known: set[str]) -> dict:
    """Fields of InternVLVisionConfig from either format, or from the vision part of a whole vision-language model."""
    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "config.json"
    content = read_json(path)
    content = content.get("vision_config") or content
    model_type = content.get("model_type")
    if model_type == "intern_vit_6b" or "qk_normalization" in content:
        return {field: content.get(original, default) for original, (field, default) in ORIGINAL_FIELDS.items()}
    if model_type == "internvl_vision":
        private = {"model_type", "architectures", "dtype", "torch_dtype", "transformers_version"}
        return {name: value for name, value in content.items() if name in known and name not in private}
    raise ValueError(
        f"{path} describes a model of type {model_type!r}; expected 'intern_vit_6b' (OpenGVLab's InternViT) or 'internvl_vision' "
        f"(transformers). Use another encoder name for this checkpoint."
    )


def _read_normalisation(checkpoint: Path) -> tuple[list[float] | None, list[float] | None]:
    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "preprocessor_config.json"
    content = read_json(path) if path.is_file() else {}
    return content.get("image_mean"), content.get("image_std")


def _translate(tensors: Iterator[tuple[str, StoredTensor]]) -> Iterator[tuple[str, StoredTensor]]:
    """Original names -> transformers' names; transformers' own pass through; other parts of a whole model are left out."""
    for key, tensor in tensors:
        prefix = next((prefix for prefix in ENCODER_PREFIXES if key.startswith(prefix)), "")
        if not prefix and key.startswith(OTHER_PARTS):
            continue
        name = key.removeprefix(prefix)
        if not name.startswith("encoder.layers."):
            yield ORIGINAL_KEYS.get(name, name), tensor
            continue
        _, _, index, rest = name.split(".", 3)
        target = f"encoder.layer.{index}."
        if rest in ("attn.qkv.weight", "attn.qkv.bias"):
            width = tensor.shape[0] // 3
            for index, part in enumerate("qkv"):  # Order: q, k, v
                yield f"{target}attention.{part}_proj.{rest.rpartition('.')[2]}", tensor.rows(index * width, (index + 1) * width)
            continue
        for original, ours in ORIGINAL_LAYER_KEYS.items():
            if rest.startswith(original):
                yield target + ours + rest.removeprefix(original), tensor
                break
        else:
            yield name, tensor  # will be reported as unexpected


def _fit_positions(tensors: Iterator[tuple[str, StoredTensor]], side: int) -> Iterator[tuple[str, StoredTensor]]:
    for name, tensor in tensors:
        if name == POSITION_KEY and tensor.shape[1] != 1 + side * side:
            resize = partial(resize_position_embedding, side=side, prefix_tokens=1)
            tensor = tensor.map(resize, shape=(1, 1 + side * side, tensor.shape[2]))
        yield name, tensor


def _square(size: int | list | tuple, name: str) -> int:
    height, width = (size, size) if isinstance(size, int) else size
    if height != width:
        raise ValueError(f"{name} is {height} x {width} px; tiles are square, so a square {name} is needed.")
    return height
