"""Eyes for Nemotron-H: a vision-language model in the NVLM-D style, its processor, and the engine that answers with it.

Needs torch, transformers and Pillow only; no DeepSpeed, no Gradio, no GPU.
"""

import logging

# torchao, which transformers imports, makes torch print a notice about torchao's own enums at every start; no user can act on it.
logging.getLogger("torch.utils._pytree").addFilter(lambda record: "register_constant() on Enum" not in record.getMessage())

from .configuration import VisionEncoderConfig, VLMConfig  # noqa: E402
from .modeling import VisionLanguageModel  # noqa: E402
from .processing import VLMImageProcessor, VLMProcessor  # noqa: E402
from .registration import register  # noqa: E402

__all__ = ["VLMConfig", "VLMImageProcessor", "VLMProcessor", "VisionEncoderConfig", "VisionLanguageModel"]
__version__ = "0.1.0"

register()
