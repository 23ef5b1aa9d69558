"""Steps of the quickstart: run what has no valid receipt, side by side where a step has several commands, and note time and memory.

A receipt holds a fingerprint of the commands, of the recipes they name, and of the steps before. A step whose receipt fits is not run
again.
"""

import hashlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import psutil

from train_vlm.ending_together import STARTED_BY, tied
from vlm.cores import usable_cores
from vlm.files import write_whole

__all__ = ["ROOT", "Step", "accelerator", "run_steps"]

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Step:
    """name; commands, run side by side; makes: what must exist afterwards; needs: earlier steps whose receipts this one depends on.
    goes_on_from: folders in which a stopped run of the same command finds what it had; those of another command are removed."""

    name: str
    commands: tuple[tuple[str, ...], ...]
    makes: tuple[Path, ...]
    needs: tuple[str, ...] = ()
    goes_on_from: tuple[Path, ...] = ()


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


class _PeakMemory(threading.Thread):
    """Largest memory of this process and its children together, in bytes (shared pages counted once), sampled every second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.peak_bytes, self._stopped = 0, threading.Event()

    def run(self):
        own = psutil.Process()
        while not self._stopped.wait(1.0):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    memory = process.memory_full_info()
                    total += getattr(memory, "pss", memory.rss)
                except psutil.Error:
                    continue  # ended between listing and asking
            self.peak_bytes = max(self.peak_bytes, total)

    def stop(self) -> int:
        self._stopped.set()
        self.join()
        return self.peak_bytes


@cache
def accelerator() -> str:
    """What the quickstart trains on: DS_ACCELERATOR, else "cuda" where torch finds a GPU it can use, else "cpu"."""
    from vlm.device import default_device

    return os.environ.get("DS_ACCELERATOR") or default_device()


def _on_chosen_gpus(command: tuple[str, ...]) -> tuple[str, ...]:
    """A launch of N ranks on the first N of CUDA_VISIBLE_DEVICES, which DeepSpeed's launcher takes away when it is told a number of GPUs.
    Raises RuntimeError where they are not N, or not told by their numbers."""
    told = os.environ.get("CUDA_VISIBLE_DEVICES")
    if "--num_gpus" not in command or told is None or accelerator() != "cuda":
        return command
    place = command.index("--num_gpus")
    ranks, chosen = int(command[place + 1]), [word.strip() for word in told.split(",")]
    if len(chosen) < ranks or not all(word.isdigit() for word in chosen[:ranks]):
        raise RuntimeError(f"CUDA_VISIBLE_DEVICES is {told!r}; expected {ranks} or more numbers of GPUs, one for each rank (--ranks)")
    return (*command[:place], "--include", f"localhost:{','.join(chosen[:ranks])}", *command[place + 2 :])


def _environment(side_by_side: int) -> dict:
    environment = dict(os.environ) | {STARTED_BY: str(os.getpid())}
    environment["DS_ACCELERATOR"] = accelerator()
    environment.setdefault("HF_HUB_OFFLINE", "1")
    environment.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # torch's large buffers in large pages
    environment.setdefault("TRANSFORMERS_VERBOSITY", "error")
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment.setdefault("OMP_NUM_THREADS", str(max(1, usable_cores() // max(1, side_by_side))))
    return environment


def _fingerprint(step: Step, receipts: dict[str, dict]) -> str:
    recipes = {part: Path(part).read_text(encoding="utf-8") for command in step.commands for part in command if part.endswith(".yaml")}
    known = [[list(command) for command in step.commands], recipes, [receipts[name]["fingerprint"] for name in step.needs]]
    return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def run_steps(steps: list[Step], out: Path) -> dict[str, dict]:
    """Run what has no valid receipt. Returns {step: {"fingerprint", "seconds", "peak_bytes", "reused"}}.

    Raises RuntimeError, naming the log, when a command fails.
    """
    receipts: dict[str, dict] = {}
    for number, step in enumerate(steps, 1):
        file = out / "receipts" / (step.name.replace(": ", "-") + ".json")
        fingerprint = _fingerprint(step, receipts)
        if file.is_file():
            receipt = json.loads(file.read_text(encoding="utf-8"))
            if receipt["fingerprint"] == fingerprint and all(path.exists() for path in step.makes):
                receipts[step.name] = receipt | {"reused": True}
                print(f"[{number}/{len(steps)}] {step.name}: finished before ({receipt['seconds']:.0f} s)", flush=True)
                continue
            file.unlink()
        print(f"[{number}/{len(steps)}] {step.name}", flush=True)
        begun = file.with_suffix(".begun")
        if step.goes_on_from and not (begun.is_file() and begun.read_text(encoding="utf-8") == fingerprint):
            for folder in step.goes_on_from:
                shutil.rmtree(folder, ignore_errors=True)
            write_whole(begun, fingerprint)
        started, memory = time.monotonic(), _PeakMemory()
        memory.start()
        side_by_side = len(step.commands) if not step.name.startswith(("train", "scenes")) else 2
        running = []
        (out / "logs").mkdir(parents=True, exist_ok=True)
        for place, command in enumerate(step.commands):
            command = _on_chosen_gpus(tuple(part.replace("{free_port}", _free_port()) for part in command))
            print(f"    {shlex.join(_short(part) for part in command)}", flush=True)
            log = out / "logs" / (step.name.replace(": ", "-") + (f"-{place}" if len(step.commands) > 1 else "") + ".log")
            # One command: its bar is shown. Several side by side: their output goes to files, or they would write over each other.
            handle = None if len(step.commands) == 1 else open(log, "w", encoding="utf-8")  # noqa: SIM115
            process = subprocess.Popen(tied(command), env=_environment(side_by_side), stdout=handle, stderr=handle)
            running.append((process, handle, log, command))
        failed = None
        for process, handle, log, command in running:
            code = process.wait()
            if handle:
                handle.close()
            if code and failed is None:
                tail = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:] if handle else []
                failed = f"{step.name} failed with exit code {code}: {shlex.join(_short(part) for part in command)}" + "".join(
                    f"\n    {line}" for line in tail
                )
        peak = memory.stop()
        if failed:
            raise RuntimeError(failed)
        missing = [str(path) for path in step.makes if not path.exists()]
        if missing:
            raise RuntimeError(f"{step.name} ended without making {', '.join(missing)}")
        receipts[step.name] = {
            "fingerprint": fingerprint,
            "seconds": round(time.monotonic() - started, 1),
            "peak_bytes": peak,
            "reused": False,
        }
        write_whole(file, json.dumps(receipts[step.name]))
        print(f"    {receipts[step.name]['seconds']:.0f} s, {peak / 2**30:.1f} GB", flush=True)
    return receipts


def _short(part: str) -> str:
    """Paths as one would type them in the project's folder."""
    if part == sys.executable:
        return "python"
    if Path(part).name == "deepspeed":
        return "deepspeed"
    for place, _, rest in (part.partition(str(ROOT) + os.sep),):
        if rest:
            return place + rest
    return part
