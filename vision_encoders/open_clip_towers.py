"""The image tower of an open_clip model: CLIP's last-but-one block, or a timm trunk (SigLIP and others).

CLIP trains its last block only through the class token, so the patches are read one block earlier, without the norm that follows the
last one. The last block, that norm and the projection are taken off: the encoder holds only weights that it uses. A ResNet tower
(RN50 ...) gives the map of its last stage. Models whose tower is a timm trunk are built by the timm family: for a ViT the tokens of
the last block after the trunk's final norm, as SigLIP's users read them.
"""

from contextlib import nullcontext
from difflib import get_close_matches
from pathlib import Path

import torch
from torch import Tensor, nn

from vision_encoders.checkpoint_files import assign_weights, find_weight_files, iterate_tensors, read_json
from vision_encoders.contract import CLIP_MEAN, CLIP_STD, VisionEncoder, as_square
from vision_encoders.position_embedding import resize_position_embedding
from vision_encoders.timm_towers import build_timm_tower

__all__ = ["ClipResNet", "ClipViT", "build_open_clip"]

# Settings beside the fields of vision_cfg.
MODEL_FIELDS = ("quick_gelu", "embed_dim")


class ClipViT(VisionEncoder):
    """Features of the last-but-one block, class token dropped."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """N 3 H W -> N P C."""
        output = self.tower.forward_intermediates(pixel_values, indices=1, intermediates_only=True, output_fmt="NLC")
        return output["image_intermediates"][0]  # the class token is not among them


class ClipResNet(VisionEncoder):
    """The map of the last stage, before the attention pool."""

    def features(self, pixel_values: Tensor) -> Tensor:
        """N 3 H W -> N P C."""
        tower = self.tower
        grid = tower.layer4(tower.layer3(tower.layer2(tower.layer1(tower.stem(pixel_values)))))  # N C h w
        return as_square(grid, prefix_tokens=0, channels=grid.shape[1], channels_last=False)


def build_open_clip(model: str, checkpoint: Path | None, settings: dict) -> VisionEncoder:
    """Build the image tower of open_clip's `model`; a folder's open_clip_config.json decides the shape where there is one.

    `settings` are fields of vision_cfg (image_size, patch_size, width, layers, head_width, mlp_ratio ...), `quick_gelu` and `embed_dim`.
    OpenAI's weights need quick_gelu: their folder's config says so; for a bare file choose a "...-quickgelu" model.
    """
    open_clip = _import_open_clip()
    from open_clip.model import CLIPVisionCfg

    settings = dict(settings)
    overrides = {"mean": settings.pop("mean", None), "std": settings.pop("std", None)}
    for name in settings:
        known = [*CLIPVisionCfg.__dataclass_fields__, *MODEL_FIELDS]
        if name not in known:
            near = get_close_matches(name, known, n=1)
            raise ValueError(f"unknown setting {name!r} for 'open_clip:{model}'" + (f"; did you mean {near[0]!r}?" if near else ""))

    # 1. The shape: the folder's config, else open_clip's own; settings on top.
    stored = _read_config(checkpoint)
    base = stored.get("model_cfg") or open_clip.get_model_config(model) or {}
    if not base and not ({"layers", "width"} <= settings.keys() or settings.get("timm_model_name")):
        near = get_close_matches(model, open_clip.list_models(), n=3, cutoff=0.4)
        hint = f"; did you mean {', '.join(near)}?" if near else ""
        raise ValueError(f"open_clip {open_clip.__version__} has no model {model!r}{hint}")
    shape = dict(base.get("vision_cfg") or {}) | {"patch_dropout": 0.0, "timm_model_pretrained": False}
    for name, value in settings.items():
        if name not in MODEL_FIELDS:
            shape[name] = value
    quick_gelu = bool(settings.get("quick_gelu", base.get("quick_gelu", False)))
    embed_dim = int(settings.get("embed_dim", base.get("embed_dim", 512)))
    mean, std = _normalisation(open_clip, model, stored, overrides)

    # 2. The weights of the image tower; the text tower and the scale of the loss are not ours.
    state = None
    if checkpoint is not None:
        tensors = iterate_tensors(find_weight_files(checkpoint))
        state = {key.removeprefix("visual."): tensor for key, tensor in tensors if key.startswith("visual.")}
        if not state:
            raise ValueError(f"{checkpoint} holds no keys that start with 'visual.'; expected the weights of an open_clip model.")
    if shape.get("timm_model_name"):
        return _build_trunk(shape, settings, state, checkpoint, mean, std)
    return _build_clip(model, shape, quick_gelu, embed_dim, state, checkpoint, mean, std)


def _build_clip(
    model: str,
    shape: dict,
    quick_gelu: bool,
    embed_dim: int,
    state: dict[str, Tensor] | None,
    checkpoint: Path | None,
    mean: list[float],
    std: list[float],
) -> VisionEncoder:
    from open_clip.model import CLIPVisionCfg, _build_vision_tower

    with torch.device("meta") if state is not None else nullcontext():
        tower = _build_vision_tower(embed_dim, CLIPVisionCfg(**shape), quick_gelu=quick_gelu)
    image_size = tower.image_size if isinstance(tower.image_size, int) else tower.image_size[0]
    is_resnet = isinstance(shape.get("layers"), (list, tuple))
    patch_size = 32 if is_resnet else tower.patch_size[0]

    # The whole tower is filled, so that a file with another number of blocks is noticed; what the features do not need goes afterwards.
    if state is not None:
        if "positional_embedding" in state and not is_resnet:
            positions = state["positional_embedding"]
            state["positional_embedding"] = resize_position_embedding(positions, image_size // patch_size, prefix_tokens=1)
        assign_weights(tower, state.items(), source=checkpoint or model)
    if is_resnet:
        family, hidden_size = ClipResNet, tower.layer4[-1].bn3.num_features
        tower.attnpool = nn.Identity()
    else:
        family, hidden_size, blocks = ClipViT, tower.transformer.width, tower.transformer.resblocks
        if len(blocks) < 2:
            raise ValueError(f"'open_clip:{model}' has {len(blocks)} block(s); features come from the last but one, so two are needed.")
        tower.transformer.resblocks = blocks[:-1]
        tower.ln_post, tower.proj, tower.attn_pool = nn.Identity(), None, None
    return family(
        tower,
        image_size=image_size,
        patch_size=patch_size,
        hidden_size=hidden_size,
        mean=mean,
        std=std,
        encoder_settings={"name": f"open_clip:{model}", **shape, "quick_gelu": quick_gelu, "embed_dim": embed_dim},
    )


def _build_trunk(
    shape: dict, settings: dict, state: dict[str, Tensor] | None, checkpoint: Path | None, mean: list[float], std: list[float]
) -> VisionEncoder:
    arguments = {"mean": mean, "std": std}
    if "image_size" in settings or "image_size" in shape:
        arguments["image_size"] = shape["image_size"]
    # The pooling decides which final norm timm builds; open_clip passes it on only when neither adds a projection of its own.
    pool, projection = shape.get("timm_pool", "avg"), shape.get("timm_proj", "linear")
    if projection not in ("linear", "mlp") and pool not in ("abs_attn", "rot_attn") and pool:
        arguments["global_pool"] = pool
    if state is not None:
        state = {key.removeprefix("trunk."): tensor for key, tensor in state.items() if key.startswith("trunk.")}
    return build_timm_tower(shape["timm_model_name"], arguments, state=state, source=checkpoint)


def _read_config(checkpoint: Path | None) -> dict:
    if checkpoint is None:
        return {}
    path = (checkpoint if checkpoint.is_dir() else checkpoint.parent) / "open_clip_config.json"
    return read_json(path) if path.is_file() else {}


def _normalisation(open_clip, model: str, stored: dict, overrides: dict) -> tuple[list[float], list[float]]:
    """mean and std: settings, the folder's preprocess_cfg, open_clip's note for this model's first weights, OpenAI's."""
    tags = open_clip.list_pretrained_tags_by_model(model)
    published = open_clip.get_pretrained_cfg(model, tags[0]) if tags else {}
    folder = stored.get("preprocess_cfg") or {}
    mean = overrides["mean"] or folder.get("mean") or published.get("mean") or CLIP_MEAN
    std = overrides["std"] or folder.get("std") or published.get("std") or CLIP_STD
    return list(mean), list(std)


def _import_open_clip():
    try:
        import open_clip
    except ImportError as error:
        raise ImportError("open_clip is not installed; run: pip install 'nemotron-h-vision[vision]'") from error
    return open_clip
