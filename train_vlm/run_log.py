"""What a run tells while it goes on: a bar with loss, rate and time left, a JSON line every few steps, TensorBoard, and
Weights & Biases when asked.

Only rank 0 writes. Files: `log.jsonl` (a line each logged step), `tensorboard/`, `summary.json` at the end. A run that goes on from a
checkpoint goes on with these files too: what was told of steps that are made again is taken back.
"""

import errno
import json
import os
import secrets
import shutil
import sys
import time
from pathlib import Path

from tqdm import tqdm

from vlm.files import write_whole

__all__ = ["RunLog", "cut_log", "say"]


class _Lasting:
    """A stream whose other end may go (a pipe's reader was ended by the same Ctrl-C, a terminal was closed): what is written is dropped
    then, with all that follows, whoever prints it. A run does not end for it. Of a full disk only this piece is lost."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name: str):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._try(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._try(self._stream.flush)

    def _try(self, act, *given) -> None:
        try:
            act(*given)
        except OSError as error:
            if error.errno in (errno.EPIPE, errno.EIO):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


def say(text: str) -> None:
    """Print a line, if somebody reads it."""
    print(text, file=_Lasting(sys.stdout), flush=True)


def cut_log(path: Path, step: int) -> None:
    """Keep the whole lines of log.jsonl up to `step`; a kill may have left half a line, or lines of steps that are made again."""
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []:
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):
            continue
    write_whole(path, "".join(kept))


def _start_wandb(project: str, folder: Path, settings: dict, *, goes_on: bool):
    """A run in a project; one that goes on after a kill finds itself again by the id kept in its folder."""
    try:
        import wandb
    except ImportError as error:
        raise ImportError("run.wandb needs Weights & Biases: pip install wandb") from error
    kept = folder / "wandb_id"
    name = kept.read_text(encoding="utf-8") if goes_on and kept.is_file() else secrets.token_hex(8)
    write_whole(kept, name)
    return wandb.init(project=project, name=folder.name.removesuffix(".log"), id=name, resume="allow", config=settings, dir=str(folder))


class RunLog:
    """Opened by rank 0 with the run's folder; other ranks pass folder=None and every call does nothing.

    `step` and `spent_seconds`: where the run goes on; 0 begins the files anew. `wandb`: a project of Weights & Biases, or None.

    Raises ImportError when TensorBoard is missing, or wandb when it is asked for.
    """

    def __init__(
        self,
        folder: Path | None,
        total_steps: int | None,
        title: str,
        *,
        step: int = 0,
        spent_seconds: float = 0.0,
        wandb: str | None = None,
        settings: dict | None = None,
    ):
        self.folder, self.started, self.bar, self.writer, self.file = folder, time.monotonic() - spent_seconds, None, None, None
        self.wandb = None
        if folder is None:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(f"the log of a run needs TensorBoard ({error}): pip install 'nemotron-h-vision[train]'") from error

        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").unlink(missing_ok=True)
        if step == 0:
            shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        if wandb is not None:
            self.wandb = _start_wandb(wandb, folder, settings or {}, goes_on=step > 0)
        cut_log(folder / "log.jsonl", step)
        self.file = open(folder / "log.jsonl", "a", encoding="utf-8")  # noqa: SIM115 (closed in `close`)
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        # In a file or a pipe a bar is a line each time: once in half a minute is enough.
        self.bar = tqdm(
            total=total_steps, initial=step, desc=title, unit="step", mininterval=1.0 if sys.stderr.isatty() else 30.0, dynamic_ncols=True,
            file=_Lasting(sys.stderr),
        )  # fmt: skip

    def set_total(self, steps: int) -> None:
        if self.bar is not None:
            self.bar.total = steps

    def advance(self) -> None:
        if self.bar is not None:
            self.bar.update(1)

    def record(self, step: int, values: dict) -> None:
        if self.folder is None:
            return
        self.file.write(json.dumps({"step": step, "seconds": round(time.monotonic() - self.started, 2), **values}) + "\n")
        self.file.flush()
        for name, value in values.items():
            if value is not None and not isinstance(value, str):
                self.writer.add_scalar(name, value, step)
        if self.wandb is not None:
            self.wandb.log(values, step=step)
        rates = [value for name, value in values.items() if name.startswith("lr/")]
        if rates:
            self.bar.set_postfix_str(f"loss {values['loss']:.3f}, rate {max(rates):.1e}", refresh=False)

    def tell(self, step: int, event: dict) -> None:
        """What happens now and then: {"event": its kind, "text": a line for the reader, ...}, printed and written to log.jsonl."""
        if self.folder is None:
            return
        self.file.write(json.dumps({"step": step, "seconds": round(time.monotonic() - self.started, 2), **event}) + "\n")
        self.file.flush()
        tqdm.write(event["text"], file=_Lasting(sys.stdout))
        _Lasting(sys.stdout).flush()

    def close(self, summary: dict | None = None) -> None:
        """Write the summary and end everything else; a second call does nothing."""
        if self.folder is None or self.file.closed:
            return
        self.bar.close()
        self.writer.close()
        self.file.close()
        if self.wandb is not None:
            self.wandb.finish()
        if summary is not None:
            write_whole(self.folder / "summary.json", json.dumps(summary, indent=1))
