"""Join a vision encoder, a fresh projector and a decoder into one model folder; or take the decoder out again.

python -m vlm.assemble --preset tiny --out DIR
python -m vlm.assemble --preset 8b --language-model DIR --vision-encoder internvit --vision-checkpoint DIR --out DIR
python -m vlm.assemble --model DIR --to-language-model DIR
"""

import argparse
import json
import sys
from pathlib import Path

import torch
from transformers import AutoTokenizer
from transformers.models.nemotron_h import NemotronHForCausalLM

from vision_encoders import build_vision_encoder

from .checkpoint import load_model, save_model
from .configuration import VisionEncoderConfig, VLMConfig
from .decoder import load_language_model, preset_config
from .modeling import VisionLanguageModel
from .processing import VLMImageProcessor, VLMProcessor
from .rendering import chat_formats, image_tokens
from .small_tokenizer import train_small_tokenizer

__all__ = ["assemble", "main", "to_language_model"]

PRESETS = ("tiny", "4b", "8b", "47b", "56b", "9b-v2", "12b-v2", "30b-a3b")
TINY_ENCODER = {"name": "internvit", "image_size": 64, "patch_size": 8, "hidden_size": 128, "num_hidden_layers": 4,
                "num_attention_heads": 4,                 "intermediate_size": 512}  # fmt: skip
CORPUS = Path(__file__).with_name("small_corpus.txt")


def _corpus_texts(paths: list[str]) -> list[str]:
    """Texts of plain files (a line each) and of LLaVA JSON files (a turn each)."""
    texts = []
    for path in [*paths, CORPUS]:
        if not Path(path).is_file():
            raise FileNotFoundError(f"no tokenizer corpus at {path}; expected a text file or LLaVA JSON")
        content = Path(path).read_text(encoding="utf-8")
        if str(path).endswith(".json"):
            try:
                samples = json.loads(content)
                texts += [turn["value"].replace("<image>", "") for sample in samples for turn in sample["conversations"]]
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{path} is no LLaVA JSON ({error}); expected a list of {{'conversations': [...]}}") from error
        else:
            texts += content.splitlines()
    return texts


def _settings(pairs: list[str]) -> dict:
    """["a=1", "b=x"] -> {"a": 1, "b": "x"}; values are JSON where they parse as such."""
    settings = {}
    for pair in pairs:
        key, found, value = pair.partition("=")
        if not found:
            raise ValueError(f"--vision-setting {pair!r}; expected key=value")
        try:
            settings[key] = json.loads(value)
        except ValueError:
            settings[key] = value
    return settings


def assemble(
    preset: str,
    *,
    language_model: str | None = None,
    vision_encoder: str | None = None,
    vision_checkpoint: str | None = None,
    vision_settings: dict | None = None,
    tokenizer_corpus: list[str] = (),
    tile_size: int | None = None,
    max_tiles: int | None = None,
    pixel_shuffle_factor: int = 2,
    seed: int = 0,
) -> tuple[VisionLanguageModel, VLMProcessor]:
    """A model with a fresh projector, and its processor. Without `language_model` the decoder has random weights.

    Raises ValueError / FileNotFoundError for an unknown preset, a folder that is no checkpoint, or parts that do not fit.
    """
    torch.manual_seed(seed)
    small = preset == "tiny"
    if language_model:
        decoder = load_language_model(language_model)
        tokenizer = AutoTokenizer.from_pretrained(language_model)
        chat = chat_formats()["nemotron" if "<SPECIAL_14>" in tokenizer.get_vocab() else "chatml"]
        marks = [mark for mark in (chat.turn_open, chat.turn_close) if mark not in tokenizer.get_vocab()]
        tokenizer.add_special_tokens({"additional_special_tokens": [*marks, *image_tokens()]}, replace_extra_special_tokens=False)
        if len(tokenizer) > decoder.config.vocab_size:
            decoder.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64)
    else:
        tokenizer = train_small_tokenizer(_corpus_texts(list(tokenizer_corpus)))
        chat = chat_formats()["small" if small else "chatml"]
        config = preset_config(preset)
        if small:
            config.vocab_size = -(-len(tokenizer) // 64) * 64
        config.pad_token_id, config.bos_token_id = tokenizer.pad_token_id, None
        config.eos_token_id = tokenizer.convert_tokens_to_ids(chat.turn_close)
        decoder = NemotronHForCausalLM(config)
    if vision_encoder is None and vision_checkpoint is None and small:
        encoder = build_vision_encoder(**{**TINY_ENCODER, **(vision_settings or {})})
    else:
        encoder = build_vision_encoder(vision_encoder or "internvit", checkpoint=vision_checkpoint, **(vision_settings or {}))
    grid = encoder.image_size // encoder.patch_size
    if grid % pixel_shuffle_factor:
        raise ValueError(f"a tile has {grid} x {grid} features, which a pixel shuffle of {pixel_shuffle_factor} does not divide")
    if tile_size is not None and tile_size != encoder.image_size:
        raise ValueError(
            f"{tile_size = }, but the encoder reads tiles of {encoder.image_size} px; give it --vision-setting image_size={tile_size}"
        )
    visual_tokens = (grid // pixel_shuffle_factor) ** 2
    config = VLMConfig(
        vision_config=VisionEncoderConfig(
            encoder=encoder.encoder_settings, hidden_size=encoder.hidden_size, image_size=encoder.image_size, patch_size=encoder.patch_size
        ),
        text_config=decoder.config,
        projector_hidden_size=decoder.config.intermediate_size,
        pixel_shuffle_factor=pixel_shuffle_factor,
        image_token_id=tokenizer.convert_tokens_to_ids(image_tokens()[0]),
        visual_tokens_per_tile=visual_tokens,
    )
    model = VisionLanguageModel(config, vision_encoder=encoder, language_model=decoder)
    model.generation_config.eos_token_id = tokenizer.convert_tokens_to_ids(chat.turn_close)
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.generation_config.suppress_tokens = [config.image_token_id]  # a placeholder in an answer would have no tile
    if not language_model:
        # Larger visual tokens beside the decoder's small random words. Chosen, not proven: 0.58 against 0.59 to 0.62 after 375 steps, in
        # runs that differed in other settings too (docs/decisions.md).
        with torch.no_grad():
            model.projector.linear_2.weight.mul_(4.0)
    model.projector.to(decoder.dtype)
    images = VLMImageProcessor(
        tile_size=encoder.image_size,
        max_tiles=max_tiles or (6 if small else 12),
        image_mean=list(encoder.mean),
        image_std=list(encoder.std),
    )
    return model.eval(), VLMProcessor(images, tokenizer, chat_format=chat, visual_tokens_per_tile=visual_tokens)


def to_language_model(model_folder: str, out: str) -> Path:
    """Save the decoder of a model folder, with its tokenizer, as a language model of its own."""
    model, processor = load_model(model_folder)
    model.language_model.save_pretrained(out)
    processor.tokenizer.save_pretrained(out)
    return Path(out)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m vlm.assemble", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, help="shape of the decoder")
    parser.add_argument(
        "--language-model", metavar="DIR", help="decoder checkpoint (NVIDIA's or transformers' format); random weights without"
    )
    parser.add_argument("--vision-encoder", metavar="NAME", help="internvit, timm:MODEL, open_clip:MODEL")
    parser.add_argument("--vision-checkpoint", metavar="DIR", help="encoder checkpoint, a folder or file")
    parser.add_argument(
        "--vision-setting", action="append", default=[], metavar="KEY=VALUE", help="setting of the encoder; may be repeated"
    )
    parser.add_argument(
        "--tokenizer-corpus", action="append", default=[], metavar="FILE", help="text or LLaVA JSON for the small tokenizer"
    )
    parser.add_argument("--max-tiles", type=int, help="most tiles of an image, without the thumbnail")
    parser.add_argument("--pixel-shuffle-factor", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", metavar="DIR", help="folder of the assembled model")
    parser.add_argument("--model", metavar="DIR", help="an assembled model, to take the decoder out of")
    parser.add_argument("--to-language-model", metavar="DIR", help="folder for that decoder")
    options = parser.parse_args(arguments)
    try:
        if options.model or options.to_language_model:
            if not (options.model and options.to_language_model):
                raise ValueError("--model and --to-language-model belong together; give both")
            print(f"decoder written to {to_language_model(options.model, options.to_language_model)}")
            return 0
        if not (options.preset and options.out):
            raise ValueError("give --preset and --out (or --model and --to-language-model)")
        model, processor = assemble(
            options.preset,
            language_model=options.language_model,
            vision_encoder=options.vision_encoder,
            vision_checkpoint=options.vision_checkpoint,
            vision_settings=_settings(options.vision_setting),
            tokenizer_corpus=options.tokenizer_corpus,
            max_tiles=options.max_tiles,
            pixel_shuffle_factor=options.pixel_shuffle_factor,
            seed=options.seed,
        )
        for name, count in model.parameter_counts().items():
            print(f"{name:>16} {count:>14,} parameters")
        print(f"{'visual tokens':>16} {model.config.visual_tokens_per_tile:>14,} per tile of {processor.image_processor.tile_size} px")
        print(f"written to {save_model(model, processor, options.out)}")
        return 0
    except (ValueError, FileNotFoundError, ImportError, OSError) as error:
        print(f"assemble: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
