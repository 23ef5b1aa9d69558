"""Pixels to patch features: one contract over InternViT, open_clip and timm towers."""

from vision_encoders.contract import VisionEncoder
from vision_encoders.registry import VISION_ENCODERS, build_vision_encoder, open_vision_encoder

__all__ = ["VISION_ENCODERS", "VisionEncoder", "build_vision_encoder", "open_vision_encoder"]
