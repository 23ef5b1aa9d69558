"""Make transformers' Auto classes know this model, so that `from_pretrained` opens our folders after `import vlm`."""

import inspect

from transformers import AutoConfig, AutoImageProcessor, AutoModelForImageTextToText, AutoProcessor

from .configuration import VisionEncoderConfig, VLMConfig
from .modeling import VisionLanguageModel
from .processing import VLMImageProcessor, VLMProcessor

__all__ = ["register"]


def register() -> None:
    """Idempotent."""
    AutoConfig.register(VisionEncoderConfig.model_type, VisionEncoderConfig, exist_ok=True)
    AutoConfig.register(VLMConfig.model_type, VLMConfig, exist_ok=True)
    AutoModelForImageTextToText.register(VLMConfig, VisionLanguageModel, exist_ok=True)
    AutoProcessor.register(VLMConfig, VLMProcessor, exist_ok=True)
    # One class serves whatever backend is asked for; older releases know only the slow and the fast one.
    if "image_processor_classes" in inspect.signature(AutoImageProcessor.register).parameters:
        classes = {"image_processor_classes": {"pil": VLMImageProcessor, "torchvision": VLMImageProcessor}}
    else:
        classes = {"slow_image_processor_class": VLMImageProcessor}
    AutoImageProcessor.register(VLMConfig, **classes, exist_ok=True)
