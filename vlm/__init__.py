"""Eyes for Nemotron-H: a vision-language model in the NVLM-D style, its processor, and the engine that answers with it.

Needs torch, transformers and Pillow only; no DeepSpeed, no Gradio, no GPU.
"""

from .configuration import VisionEncoderConfig, VLMConfig
from .modeling import VisionLanguageModel
from .processing import VLMImageProcessor, VLMProcessor
from .registration import register

__all__ = ["VLMConfig", "VLMImageProcessor", "VLMProcessor", "VisionEncoderConfig", "VisionLanguageModel"]
__version__ = "0.1.0"

register()
