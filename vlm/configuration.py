"""What a vision-language model *is*: encoder, projector, decoder and how images stand in the text. It travels in the checkpoint.

How a run trains is a recipe (train_vlm/recipe.py); where it runs comes from the launcher.
"""

from transformers import PreTrainedConfig
from transformers.models.nemotron_h import NemotronHConfig

__all__ = ["VLMConfig", "VisionEncoderConfig"]


class VisionEncoderConfig(PreTrainedConfig):
    """Settings that rebuild the vision encoder without its own checkpoint: `build_vision_encoder(**encoder)`.

    encoder: {"name": "internvit" | "timm:MODEL" | "open_clip:MODEL", ...settings}. hidden_size, image_size and patch_size repeat what the
    built encoder says, for tools that read configurations; the model checks that they agree.
    """

    model_type = "vlm_vision_encoder"

    encoder: dict | None = None
    hidden_size: int = 1024
    image_size: int = 448
    patch_size: int = 14


class VLMConfig(PreTrainedConfig):
    """vision_config, text_config (a NemotronHConfig) and what joins them.

    projector_hidden_size: width of the projector's hidden layer (Nemotron-H VLM: the decoder's FFN width).
    pixel_shuffle_factor: side of the square of features that becomes one visual token (2: 1024 patches -> 256 visual tokens).
    image_token_id: the placeholder's id; visual_tokens_per_tile: placeholders of one tile.
    origins: what the folders of the parts said about themselves when the model was assembled (name, licence), for the model card.
    """

    model_type = "nemotron_h_vlm"
    sub_configs = {"vision_config": VisionEncoderConfig, "text_config": NemotronHConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    projector_hidden_size: int = 21504
    projector_activation: str = "gelu"
    pixel_shuffle_factor: int = 2
    image_token_id: int = 0
    visual_tokens_per_tile: int = 256
    origins: dict | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        for name, kind in self.sub_configs.items():
            value = getattr(self, name)
            if value is None:
                value = {}
            if isinstance(value, dict):
                value = kind(**{key: item for key, item in value.items() if key != "model_type"})
            setattr(self, name, value)
        super().__post_init__(**kwargs)

    def get_text_config(self, *args, **kwargs):
        """The decoder's configuration: what transformers' generation and cache ask for."""
        return self.text_config
