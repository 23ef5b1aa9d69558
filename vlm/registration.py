"""Make transformers' Auto classes know this model, so that `from_pretrained` opens our folders after `import vlm`."""

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
    AutoImageProcessor.register(VLMConfig, slow_image_processor_class=VLMImageProcessor, exist_ok=True)
