"""What a run was made with, by content: a short name for a checkpoint folder, and how its pictures and text are prepared.

A run is not continued with another model, and a score says what it is of. Nothing here imports torch.
"""

import json
from hashlib import sha256
from pathlib import Path

__all__ = ["model_fingerprint", "preprocessing"]

WHOLE_BYTES = 8 << 20  # files up to here are hashed whole
STRIDE_BYTES, SAMPLE_BYTES = 64 << 10, 4 << 10  # of what follows in larger ones, so much of every stride: any changed matrix is noticed


def model_fingerprint(folder: str | Path) -> str:
    """SHA-256 (hex) over names, sizes and contents of the folder's files (subfolders aside); large weight files are sampled evenly.

    Raises FileNotFoundError for what is no folder and ValueError for a folder without config.json.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"the model folder {folder} does not exist")
    if not (folder / "config.json").is_file():
        raise ValueError(f"{folder} is no checkpoint: it has no config.json; give a folder made by vlm.assemble or by training")
    digest = sha256()
    for path in sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith(".")):
        size = path.stat().st_size
        digest.update(f"{path.name}\0{size}\0".encode())
        with open(path, "rb") as file:
            digest.update(file.read(WHOLE_BYTES))
            for start in range(WHOLE_BYTES, size, STRIDE_BYTES):
                file.seek(start)
                digest.update(file.read(SAMPLE_BYTES))
            if size > WHOLE_BYTES:
                file.seek(-SAMPLE_BYTES, 2)
                digest.update(file.read())
    return digest.hexdigest()


def preprocessing(folder: str | Path) -> dict:
    """How the checkpoint prepares its input: the image processor's settings under "tiles", visual_tokens_per_tile, and "sha256" over
    those, the chat format and the tokenizer. A folder without such files gives empty settings."""
    folder = Path(folder)
    processor = _json(folder / "processor_config.json")
    tiles = _json(folder / "preprocessor_config.json") or processor.get("image_processor") or {}
    digest = sha256(json.dumps([tiles, processor], sort_keys=True).encode())
    for name in ("chat_template.jinja", "tokenizer.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            digest.update(name.encode() + (folder / name).read_bytes())
    kept = {key: tiles[key] for key in ("tile_size", "max_tiles", "policy", "thumbnail", "image_mean", "image_std") if key in tiles}
    return {"tiles": kept, "visual_tokens_per_tile": processor.get("visual_tokens_per_tile"), "sha256": digest.hexdigest()}


def _json(path: Path) -> dict:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_bytes())
    except ValueError:
        raise ValueError(f"{path} is not valid JSON: the checkpoint is damaged") from None
    return content if isinstance(content, dict) else {}
