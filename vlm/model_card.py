"""The README.md of a model folder: what the model is made of, and whose licences it stands under.

A folder with a card can be uploaded as it is. The card states what the folders of the parts said about themselves (`config.origins`) and,
where they said nothing, the licence under which that family was published when docs/licences.md was written; it never decides for
the reader which terms hold for the whole.
"""

from .configuration import VLMConfig
from .decoder.pattern import letters_of

__all__ = ["model_card"]

# Family of encoders -> (its name, licence of its published weights, where to check). docs/licences.md has the same with more words.
FAMILIES = {
    "intern": ("InternViT (OpenGVLab)", "MIT", "https://huggingface.co/OpenGVLab"),
    "radio": ("C-RADIO (NVIDIA)", "NVIDIA Open Model License", "https://huggingface.co/nvidia"),
    "dinov2": ("DINOv2 (Meta)", "Apache-2.0", "https://github.com/facebookresearch/dinov2"),
    "siglip": ("SigLIP (Google)", "Apache-2.0", "https://huggingface.co/google"),
    "clip": ("CLIP (OpenAI; others' CLIP models differ)", "MIT", "https://github.com/openai/CLIP"),
}  # the first one whose key stands in the encoder's name: "siglip" before "clip"
DECODER = (
    "Nemotron-H (NVIDIA)",
    "NVIDIA Open Model License, or the NVIDIA Internal Scientific Research and Development Model License for the first Nemotron-H models",
    "https://huggingface.co/nvidia",
)


def model_card(config: VLMConfig) -> str:
    """Markdown with the YAML head that the hub reads."""
    encoder = config.vision_config.encoder or {}
    text = config.text_config
    letters = letters_of(text.layers_block_type)
    origins = config.origins or {}
    bases = [origin["name"] for origin in origins.values() if "/" in origin.get("name", "")]
    head = ["---", "library_name: transformers", "pipeline_tag: image-text-to-text", "license: other",
            "license_name: see-the-licences-of-the-parts", "tags:", "- nemotron-h", "- vision-language-model", "- mamba2"]  # fmt: skip
    head += ["base_model:", *(f"- {name}" for name in bases)] if bases else []
    lines = [
        *head,
        "---",
        "",
        "# A Nemotron-H that sees",
        "",
        "A vision-language model in the NVLM-D style, assembled with Nemotron-H Vision. Not yet described: what it was trained on, what it",
        "is for, how well it does. Fill these in before you publish it.",
        "",
        "| part | what it is |",
        "|---|---|",
        f"| vision encoder | `{encoder.get('name', 'unknown')}`, {config.vision_config.hidden_size} wide, tiles of "
        f"{config.vision_config.image_size} px, patches of {config.vision_config.patch_size} px |",
        f"| projector | pixel shuffle by {config.pixel_shuffle_factor}, MLP {config.projector_hidden_size} wide; "
        f"{config.visual_tokens_per_tile} visual tokens a tile |",
        f"| language model | Nemotron-H, {text.hidden_size} wide, {len(letters)} layers `{letters}`, {text.vocab_size:,} words |",
        "",
        "## Licences of the parts",
        "",
        "Check each model's own page: it decides, not this list.",
        "",
        _licence_line("Language model", origins.get("language_model"), DECODER),
        _licence_line("Vision encoder", origins.get("vision_encoder"), _encoder_licence(encoder.get("name", ""))),
        "- Projector: fresh weights of whoever trains this model.",
        "",
        "## Use",
        "",
        "```python",
        "import vlm",
        "from transformers import AutoModelForImageTextToText, AutoProcessor",
        "",
        'model, processor = AutoModelForImageTextToText.from_pretrained("FOLDER"), AutoProcessor.from_pretrained("FOLDER")',
        "```",
    ]
    return "\n".join(lines) + "\n"


def _licence_line(part: str, origin: dict | None, published: tuple[str, str, str] | None) -> str:
    if origin is None:
        return f"- {part}: random weights when it was assembled; under no licence but yours."
    said = [f"{field.replace('_', ' ')} `{origin[field]}`" for field in ("license", "license_name", "license_link") if origin.get(field)]
    if origin.get("license_files"):
        said.append(f"licence files {', '.join(f'`{name}`' for name in origin['license_files'])}")
    line = f"- {part} `{origin.get('name', 'unknown')}`: "
    line += f"its folder said: {', '.join(said)}." if said else "its folder named no licence."
    if published:
        family, licence, where = published
        line += f" {family} is published under: {licence}; see {where}."
    return line


def _encoder_licence(name: str) -> tuple[str, str, str] | None:
    """(family, licence, where to look) by the encoder's name; None for one this project knows nothing about."""
    words = name.lower().replace("open_clip:", "clip ")
    return next((facts for word, facts in FAMILIES.items() if word in words), None)
