"""The processes of a run: starting DeepSpeed on each, and what they say to each other outside of the gradients.

All ranks must agree on every decision (stop, save, which checkpoint), or their collectives no longer match and the run hangs. So one rank
decides, and the others hear it.
"""

import contextlib
import os
import resource
import socket
import sys
import time
from collections.abc import Callable
from datetime import timedelta

import torch

from train_vlm.recipe import Recipe
from vision_encoders.gathering import gather_over_ranks
from vlm.cores import usable_cores
from vlm.engine.allocation import keep_freed_memory

__all__ = ["FailedElsewhereError", "end_ranks", "on_first_rank", "start_deepspeed", "sum_over_ranks", "trains_on_gpu"]


PORT_SECONDS = 10.0
PATIENCE = timedelta(hours=4)
"""How long ranks wait for one of them that reads a checkpoint of a hundred gigabytes, lays it out for other ranks, or writes the model.
DeepSpeed's 10 minutes would end the run, and its next start at the same place. DEEPSPEED_TIMEOUT (minutes) overrides it."""


class FailedElsewhereError(RuntimeError):
    """The first rank failed and says why; this rank ends without a word."""


def start_deepspeed(recipe: Recipe):
    """Import and initialise DeepSpeed; returns (deepspeed, rank, world size, local device)."""
    has_gpu = torch.cuda.is_available()
    if not has_gpu:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ImportError("training needs DeepSpeed: pip install 'nemotron-h-vision[train]'") from error
    on_gpu = trains_on_gpu()
    if on_gpu and not has_gpu:
        raise ValueError(
            "DS_ACCELERATOR is cuda, and torch finds no GPU it can use: nvidia-smi says why; DS_ACCELERATOR=cpu trains without"
        )
    for name, default in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "29500")):
        os.environ.setdefault(name, default)
    local = int(os.environ["LOCAL_RANK"])
    _open_many_files()
    # Also on GPUs, whose processors update what is offloaded: all ranks of a machine with all of its cores would be slower than one.
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or os.environ["WORLD_SIZE"])
    torch.set_num_threads(recipe.run.threads_per_rank or max(1, usable_cores() // ranks_here))
    if on_gpu:  # what ranks say to each other before there is an engine goes over their own GPU
        torch.cuda.set_device(local)
    else:
        # The shared-memory kernel is for inference only, and building it takes most of a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        keep_freed_memory()  # a step's tensors come again with the next
    _wait_for_port()
    patience = {} if "DEEPSPEED_TIMEOUT" in os.environ else {"timeout": PATIENCE}
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False, **patience)
    device = torch.device("cuda", local) if on_gpu else torch.device("cpu")
    return deepspeed, torch.distributed.get_rank(), torch.distributed.get_world_size(), device


def _wait_for_port() -> None:
    """Rank 0 opens the ranks' meeting point; a process that has just ended may have its port for another second or two."""
    port = int(os.environ["MASTER_PORT"])
    if os.environ["RANK"] != "0" or not port or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun has opened it
        return
    until = time.monotonic() + PORT_SECONDS
    while time.monotonic() < until:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            with contextlib.suppress(OSError):
                probe.bind(("", port))
                return
        time.sleep(0.2)


def _open_many_files() -> None:
    """As many open files as this process may have: every tensor that a reading process hands over is one, and a step may have thousands."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def trains_on_gpu() -> bool:
    """DeepSpeed's word counts: DS_ACCELERATOR=cpu keeps a run off the GPU beside it."""
    from deepspeed import get_accelerator

    return get_accelerator().device_name() == "cuda"


def end_ranks(code: int) -> None:
    """Leave the other ranks, at the end of the program, whose exit code this is. A rank of several that fails on GPUs leaves at once, and
    the launcher ends the others: NCCL would wait for them, and they wait for this one, in a collective that it will never join."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    if code and torch.distributed.get_backend() == "nccl" and torch.distributed.get_world_size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    torch.distributed.destroy_process_group()


def sum_over_ranks(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The sum of a small tensor over all ranks, on the CPU."""
    return gather_over_ranks(tensor.to(device).flatten()).sum(0, dtype=tensor.dtype).view(tensor.shape).cpu()


def on_first_rank(action: Callable):
    """The result of `action` on rank 0, on every rank. When it raises, rank 0 raises the same and the others FailedElsewhereError."""
    told = [None, False]
    failure = None
    if torch.distributed.get_rank() == 0:
        try:
            told = [action(), True]
        except Exception as error:
            failure = error
    torch.distributed.broadcast_object_list(told, 0)
    if failure is not None:
        raise failure
    if not told[1]:
        raise FailedElsewhereError("rank 0 stopped the run")
    return told[0]
