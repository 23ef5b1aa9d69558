"""The command line of assembling and taking apart."""

import argparse
import json
import sys

from ..checkpoint import save_model
from ..decoder.pattern import letters_of
from ..decoder.presets import PRESETS, preset_config
from .extraction import to_language_model
from .in_memory import assemble
from .streaming import Assembled, assemble_folder

__all__ = ["main"]


def vision_settings(pairs: list[str]) -> dict:
    """["a=1", "b=x"] -> {"a": 1, "b": "x"}; values are JSON where they parse as such. Raises ValueError for a pair without "="."""
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlm.assemble", description=sys.modules[__package__].__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", choices=list(PRESETS), help="shape of a decoder with random weights; beside --language-model only a check")
    add("--language-model", metavar="DIR", help="decoder checkpoint, NVIDIA's or transformers' format; random weights without")
    add("--vision-encoder", metavar="NAME", help="internvit, timm:MODEL, open_clip:MODEL, transformers:TYPE (docs/encoders.md)")
    add("--vision-checkpoint", metavar="DIR", help="encoder checkpoint, a folder or file; random weights without")
    add("--vision-setting", action="append", default=[], metavar="KEY=VALUE", help="setting of the encoder; may be repeated")
    add("--tokenizer-corpus", action="append", default=[], metavar="FILE", help="text or LLaVA JSON for the small tokenizer")
    add("--tokenizer-phrase", action="append", default=[], metavar="TEXT", help="text that is one token of the small tokenizer")
    add("--max-tiles", type=int, help="most tiles of an image, without the thumbnail")
    add("--pixel-shuffle-factor", type=int, default=2)
    add("--seed", type=int, default=0)
    add("--out", metavar="DIR", help="folder of the assembled model")
    add("--model", metavar="DIR", help="an assembled model, to take the decoder out of")
    add("--to-language-model", metavar="DIR", help="folder for that decoder")
    return parser


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 2 with one line on stderr, 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    try:
        if options.model or options.to_language_model:
            return _take_out(options)
        if not (options.out and (options.preset or options.language_model)):
            raise ValueError("give --out and --preset or --language-model (or --model and --to-language-model)")
        return _join(options)
    except (ValueError, FileNotFoundError, ImportError, OSError) as error:
        print(f"assemble: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("assemble: interrupted; nothing was written", file=sys.stderr)
        return 130


def _join(options: argparse.Namespace) -> int:
    request = {
        "vision_encoder": options.vision_encoder,
        "vision_checkpoint": options.vision_checkpoint,
        "vision_settings": vision_settings(options.vision_setting),
        "max_tiles": options.max_tiles,
        "pixel_shuffle_factor": options.pixel_shuffle_factor,
        "seed": options.seed,
    }
    if options.language_model:
        if options.tokenizer_corpus or options.tokenizer_phrase:
            raise ValueError(
                "--tokenizer-corpus and --tokenizer-phrase are for decoders without a tokenizer; with --language-model its own is used"
            )
        made = assemble_folder(options.out, language_model=options.language_model, preset=options.preset, **request)
        _print_made(made, options)
        return 0
    model, processor = assemble(
        options.preset, tokenizer_corpus=options.tokenizer_corpus, tokenizer_phrases=options.tokenizer_phrase, **request
    )
    _print_parts(model.parameter_counts(), model.config.visual_tokens_per_tile, processor.image_processor.tile_size)
    print(f"written to {save_model(model, processor, options.out)}")
    return 0


def _print_parts(parameters: dict[str, int], visual_tokens: int, tile_size: int) -> None:
    for name, count in parameters.items():
        print(f"{name:>16} {count:>15,} parameters")
    print(f"{'together':>16} {sum(parameters.values()):>15,} parameters")
    print(f"{'visual tokens':>16} {visual_tokens:>15,} per tile of {tile_size} px")


def _print_made(made: Assembled, options: argparse.Namespace) -> None:
    _print_parts(made.parameters, made.visual_tokens_per_tile, made.tile_size)
    before, after = made.vocabulary_rows
    names = ", ".join(made.added_tokens[:4]) + (" ..." if len(made.added_tokens) > 4 else "")
    print(f"{'tokens added':>16} {len(made.added_tokens):>15,} {f'({names}); ' if names else ''}embeddings {before:,} -> {after:,} rows")
    if made.left_out:
        print(f"{'left out':>16} {len(made.left_out):>15,} weights that transformers' model does not have ({made.left_out[0]} ...)")
    note = _difference_from_preset(options.preset, made)
    if note:
        print(note, file=sys.stderr)
    files = "1 file" if made.shards == 1 else f"{made.shards} files"
    print(f"written to {made.folder}: {made.size_bytes / 1e9:,.2f} GB in {files}, decoder in {str(made.dtype).removeprefix('torch.')}")


def _difference_from_preset(preset: str | None, made: Assembled) -> str:
    """A line that says where the decoder is not of the preset's shape; "" where it is, or none was named."""
    if preset is None:
        return ""
    from ..configuration import VLMConfig

    found, asked = VLMConfig.from_pretrained(made.folder).text_config, preset_config(preset)
    fields = ("hidden_size", "intermediate_size", "num_attention_heads", "mamba_num_heads", "ssm_state_size")
    differing = [
        f"{name} {getattr(found, name)} (not {getattr(asked, name)})" for name in fields if getattr(found, name) != getattr(asked, name)
    ]
    if letters_of(found.layers_block_type) != letters_of(asked.layers_block_type):
        differing.append(f"layers {letters_of(found.layers_block_type)}")
    return f"note: the checkpoint's own shape is used, which is not that of {preset}: {', '.join(differing)}" if differing else ""


def _take_out(options: argparse.Namespace) -> int:
    if not (options.model and options.to_language_model):
        raise ValueError("--model and --to-language-model belong together; give both")
    made = to_language_model(options.model, options.to_language_model)
    print(f"{'language_model':>16} {made.parameters:>15,} parameters")
    if made.as_it_came:
        print(f"{'rows removed':>16} {made.rows_removed:>15,} of the vocabulary, added when the model was assembled")
        print(f"decoder written to {made.folder}, in the format it came from")
    else:
        print(f"decoder written to {made.folder}, in transformers' format ({made.reason})")
    return 0
