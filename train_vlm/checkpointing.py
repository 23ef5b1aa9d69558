"""Checkpoints of a run: written whole or not at all, checked before they are read, the newest few kept.

    OUT.checkpoints/step-00000120/    engine/    DeepSpeed's own files: weights that train, optimizer (shards of every rank under ZeRO)
                                      rank-N.pt  random states and buffers (running statistics) of each rank
                                      run.json   where the run stands, its description, size and checksum of every file

A run can be killed between any two instructions, so a checkpoint is made in a hidden folder, flushed to disk, and renamed. Weights that
do not train are not in it: they come from the model folder, whose content the description pins. What DeepSpeed cannot do is load the
shards of 2 ranks on 1 (ZeRO 1 to 3): its universal format can, and is made on the way (`reshaped`).
"""

import argparse
import contextlib
import io
import json
import os
import random
import shutil
import traceback
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from vlm.files import write_whole

__all__ = ["load_checkpoint", "newest_checkpoint", "random_states", "reshaped", "save_checkpoint", "set_random_states"]

FORMAT = 1
ENGINE = "engine"
FILES_AT_ONCE = 8


def checkpoint_folders(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    return sorted((path for path in folder.glob("step-*") if path.name.removeprefix("step-").isdigit()), reverse=True)


def random_states() -> dict:
    """Of every generator that a step may draw from, on this rank."""
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,  # of its own GPU, however many others it sees
        "numpy": np.random.get_state(),
        "python": random.getstate(),
    }


def set_random_states(states: dict) -> None:
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and torch.is_tensor(states["cuda"]):
        torch.cuda.set_rng_state(states["cuda"])
    np.random.set_state(states["numpy"])
    random.setstate(states["python"])


def _own_buffers(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Running statistics: each rank has its own, DeepSpeed saves those of rank 0."""
    return {name: buffer.detach().cpu() for name, buffer in module.named_buffers()}


def _checksum(path: Path) -> tuple[int, int]:
    """Bytes and CRC-32 of a file."""
    size = crc = 0
    with open(path, "rb") as file:
        while piece := file.read(1 << 22):
            size, crc = size + len(piece), zlib.crc32(piece, crc)
    return size, crc


def _several_at_once(action: Callable, paths: list[Path]) -> Iterator:
    """Results in order. Reading and checksums run beside Python, and a file system of many disks gives more to several than to one."""
    with ThreadPoolExecutor(FILES_AT_ONCE) as pool:
        yield from pool.map(action, paths)


def _flushed(path: Path) -> tuple[int, int]:
    _flush(path)
    return _checksum(path)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextlib.contextmanager
def _told_when_not_written(folder: Path, step: int) -> Iterator[None]:
    """An OSError that says what to do, for a disk that is full above all: torch raises a RuntimeError, "unexpected pos 649856 vs 649744" or
    "iostream error", known by where it comes from."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and traceback.extract_tb(error.__traceback__)[-1].filename != torch.serialization.__file__:
            raise
        try:
            free = f"{shutil.disk_usage(folder).free / 2**30:,.2f} GiB are free there"
        except OSError:
            free = "it cannot be asked how much is free there"
        raise OSError(
            f"the checkpoint of step {step} cannot be written to {folder} ({free}; {' '.join(str(error).split())}); make room, then "
            "give the same command again: the run goes on from the checkpoint before"
        ) from error


def save_checkpoint(engine, folder: Path, step: int, standing: dict, *, keep: int) -> Path:
    """Write the checkpoint of a step; every rank calls it. `standing`: JSON that `newest_checkpoint` gives back (rank 0's counts).

    Older ones than the `keep` newest are removed. Raises OSError when the folder cannot be written.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    final = folder / f"step-{step:08d}"
    partial = folder / f".{final.name}.partial"
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    with _told_when_not_written(folder, step):
        engine.save_checkpoint(str(partial), tag=ENGINE, save_latest=False, exclude_frozen_parameters=True)
        torch.save({"random": random_states(), "buffers": _own_buffers(engine.module)}, partial / f"rank-{rank}.pt")
    torch.distributed.barrier()
    # Files are shared out for flushing and checksums: at 100 GB one rank alone would take minutes.
    files = sorted(path for path in partial.rglob("*") if path.is_file())
    sums = {}
    for path, pair in zip(files[rank::ranks], _several_at_once(_flushed, files[rank::ranks]), strict=True):
        sums[path.relative_to(partial).as_posix()] = pair
    gathered = [None] * ranks
    torch.distributed.all_gather_object(gathered, sums)
    if rank == 0:
        manifest = {"format": FORMAT, "step": step, "ranks": ranks, "standing": standing,
                    "files": {name: list(pair) for part in gathered for name, pair in part.items()}}  # fmt: skip
        write_whole(partial / "run.json", json.dumps(manifest))
        _flush(partial / ENGINE)
        _flush(partial)
        shutil.rmtree(final, ignore_errors=True)
        os.replace(partial, final)
        _flush(folder)
        for old in checkpoint_folders(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    return final


def _read_checked(checkpoint: Path) -> dict:
    """The content of run.json. Raises ValueError when anything of the checkpoint is missing or changed."""
    try:
        manifest = json.loads((checkpoint / "run.json").read_text(encoding="utf-8"))
        files, found = manifest["files"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"its run.json cannot be read ({error})") from error
    if found != FORMAT:
        raise ValueError(f"its format is {found}, this version reads {FORMAT}")
    for name, (size, _) in files.items():
        path = checkpoint / name
        if not path.is_file():
            raise ValueError(f"{name} is missing")
        if path.stat().st_size != size:
            raise ValueError(f"{name} has {path.stat().st_size} bytes instead of {size}")
    found = _several_at_once(_checksum, [checkpoint / name for name in files])
    for (name, (size, crc)), pair in zip(files.items(), found, strict=True):
        if pair != (size, crc):
            raise ValueError(f"the content of {name} has changed")
    return manifest


def newest_checkpoint(folder: Path) -> tuple[Path, dict] | None:
    """The newest whole checkpoint and its run.json, or None. A damaged one is named, put aside as `NAME.damaged` until the start after
    this one (leftovers.py), and the one before it is taken."""
    for leftover in folder.glob(".step-*.partial"):
        shutil.rmtree(leftover, ignore_errors=True)
    for checkpoint in checkpoint_folders(folder):
        try:
            return checkpoint, _read_checked(checkpoint)
        except ValueError as error:
            aside = checkpoint.with_name(f"{checkpoint.name}.damaged")
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(checkpoint, aside)
            print(f"checkpoint {checkpoint} is damaged: {error}; skipped, kept as {aside.name} until the next start", flush=True)
    return None


def reshaped(checkpoint: Path) -> Path:
    """A checkpoint whose optimizer is sharded over other ranks than now, in DeepSpeed's universal format; called by one rank.

    Returns a folder for `load_checkpoint`, to be removed after it. The engine must be started with "load_universal".
    """
    from deepspeed.checkpoint.ds_to_universal import main as convert

    folder = checkpoint.with_name(f".{checkpoint.name}.partial")
    shutil.rmtree(folder, ignore_errors=True)
    (folder / ENGINE).mkdir(parents=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        convert(argparse.Namespace(
            input_folder=str(checkpoint / ENGINE), output_folder=str(folder / ENGINE), num_extract_workers=1, num_merge_workers=1,
            keep_temp_folder=False, strict=True, inject_missing_state=True))  # fmt: skip
    return folder


def _mend_universal(optimizer, groups: list[dict]) -> None:
    """Undo two things that DeepSpeed 0.19 does when it loads its universal format under ZeRO-3: every group gets the settings of the first
    (its weight decay, too), and all parameters share one step counter, which then counts once for each of them."""
    for group, settings in zip(optimizer.param_groups, groups, strict=True):
        group.update(settings)
    for state in getattr(optimizer, "optimizer", optimizer).state.values():
        if torch.is_tensor(state.get("step")):
            state["step"] = state["step"].clone()


def load_checkpoint(engine, checkpoint: Path, ranks_then: int, *, engine_folder: Path | None = None) -> dict | None:
    """Put weights, optimizer and buffers back; every rank calls it, after `deepspeed.initialize`.

    Returns this rank's random states, for `set_random_states` when nothing but steps will draw from them any more. `ranks_then`: ranks
    that wrote the checkpoint. With another number now, `engine_folder` is what `reshaped` gave (none is needed without ZeRO), and there
    are no states (None): they begin anew from the seed. Raises ValueError when DeepSpeed finds nothing in the folder.
    """
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    groups = [{key: value for key, value in group.items() if key != "params"} for group in engine.optimizer.param_groups]
    found, _ = engine.load_checkpoint(
        str(engine_folder or checkpoint), tag=ENGINE, load_module_strict=False, load_optimizer_states=True, load_lr_scheduler_states=False
    )
    if found is None:
        raise ValueError(f"DeepSpeed finds no state in {checkpoint}")
    _mend_universal(engine.optimizer, groups)
    own = torch.load(checkpoint / f"rank-{rank % ranks_then}.pt", map_location="cpu", weights_only=False)
    buffers = dict(engine.module.named_buffers())
    for name, value in own["buffers"].items():
        buffers[name].copy_(value)
    return own["random"] if ranks == ranks_then else None
