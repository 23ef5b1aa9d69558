"""Where the parts of a model came from and under which licence their own folders say they stand: facts read, nothing guessed."""

import re
from pathlib import Path

from vision_encoders.checkpoint_files import read_json

__all__ = ["origins_of"]

CARD_FIELDS = ("license", "license_name", "license_link")
LICENCE_WORDS = ("license", "licence", "notice")


def origins_of(language_model: str | Path | None, vision_checkpoint: str | Path | None) -> dict:
    """{part: {"name", "license", "license_name", "license_link", "license_files"}} for parts that have a folder; absent fields left out."""
    parts = {"language_model": language_model, "vision_encoder": vision_checkpoint}
    return {part: _read(Path(folder)) for part, folder in parts.items() if folder}


def _read(folder: Path) -> dict:
    folder = folder if folder.is_dir() else folder.parent
    origin = {"name": _published_name(folder) or folder.resolve().name}
    card = folder / "README.md"
    if card.is_file():
        head = card.read_text(encoding="utf-8", errors="replace").removeprefix("\ufeff")
        front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", head, flags=re.DOTALL)
        for field in CARD_FIELDS:
            found = re.search(rf"^{field}:[ \t]*(\S.*)$", front.group(1), flags=re.MULTILINE) if front else None
            if found:
                origin[field] = found.group(1).strip().strip("'\"")
    files = sorted(path.name for path in folder.iterdir() if path.is_file() and any(word in path.name.lower() for word in LICENCE_WORDS))
    if files:
        origin["license_files"] = files
    return origin


def _published_name(folder: Path) -> str | None:
    """The name on the hub that some configs carry (`owner/model`); never a path."""
    path = folder / "config.json"
    name = read_json(path).get("_name_or_path") if path.is_file() else None
    return name if isinstance(name, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", name) else None
