"""What a killed run leaves that nobody will read: half-written folders and damaged checkpoints, each as large as the model.

Only names that our own writers give, and only under the run's lock (run_lock.py): then whoever wrote them is dead.
"""

import os
import re
import shutil
from pathlib import Path

from train_vlm.adapters import adapter_folder
from train_vlm.resuming import checkpoints_of

__all__ = ["remove_leftovers"]

# vlm.checkpoint.replace_folder and vlm.files.write_whole write beside their target; checkpointing.py into `.step-N.partial`.
TEMPORARY = r"\.{name}\.[a-z0-9_]{{8}}\.partial"
IN_CHECKPOINTS = re.compile(r"step-\d+\.damaged|\.step-\d+\.partial")


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.lstat().st_size for file in files)


def _found(out: Path) -> list[Path]:
    found = []
    for target in (out, adapter_folder(out)):
        pattern = re.compile(TEMPORARY.format(name=re.escape(target.name)))
        found += [path for path in out.parent.iterdir() if pattern.fullmatch(path.name)] if out.parent.is_dir() else []
        old = target.with_name(f".{target.name}.old")
        if old.is_dir() and not target.exists():
            os.replace(old, target)  # killed between its two renames: the model that was there before is there again
        elif old.is_dir():
            found.append(old)
    for folder in (out, out.with_name(out.name + ".log")):
        names = re.compile(TEMPORARY.format(name=".+"))
        found += [path for path in folder.iterdir() if path.is_file() and names.fullmatch(path.name)] if folder.is_dir() else []
    folder = checkpoints_of(out)
    return found + ([path for path in folder.iterdir() if IN_CHECKPOINTS.fullmatch(path.name)] if folder.is_dir() else [])


def remove_leftovers(out: str | Path) -> None:
    """Remove what dead runs left beside and in `out`, its log and its checkpoints, and say so in one line."""
    if found := sorted(_found(Path(out))):
        size = sum(map(_size, found))
        for path in found:
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
        print(f"removed what a stopped run left: {', '.join(path.name for path in found)} ({size / 2**20:,.1f} MB)", flush=True)
