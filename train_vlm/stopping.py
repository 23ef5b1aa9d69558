"""A run that is asked to end: it finishes its step, saves, and ends with exit code 4, so that the same command goes on from there.

Asked by SIGTERM (a scheduler that wants the machine back, `kill`), SIGUSR1 (Slurm's --signal=USR1@120), the first Ctrl-C, or by the end of
a launcher (ending_together.py). A second Ctrl-C ends it at once. Whichever rank hears of it, all end at the same step (`train_step`).

Launchers send SIGTERM for another reason, too: a rank has died, and the others must not wait for it. Python's own handlers would not do
then, for they wait until the main thread comes back from its collective, which it never does. So a thread listens, and a rank whose
neighbour is gone ends at once.
"""

import contextlib
import os
import signal
import sys
import threading
from pathlib import Path

from train_vlm.ending_together import is_there, launchers_above

__all__ = ["AskedToStop", "StopRequest", "leave_signals_to_parent", "stopped_words"]

ASKING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1") if hasattr(signal, name))


class AskedToStop(Exception):  # noqa: N818 (no error)
    """The run ended before its last step because it was asked to; str() says where it stands."""


def leave_signals_to_parent(worker: int = 0) -> None:
    """In a reading process: whatever asks all processes of a run to end must not take the samples from the step that is under way."""
    signal.set_wakeup_fd(-1)  # forked: its parent's
    for number in ASKING:
        signal.signal(number, signal.SIG_IGN)


def _neighbours() -> list:
    """The other ranks that this one's launcher started here, as psutil's processes."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or not (above := launchers_above()):
        return []
    import psutil

    found = []
    for process in above[0].children():
        with contextlib.suppress(psutil.Error):  # gone while it was asked
            if process.pid != os.getpid() and sys.argv[0] in process.cmdline():
                found.append(process)
    return found


def stopped_words(step: int, folder: Path | None, by: str | None) -> str:
    """What a run that ended early says. `folder`: of its checkpoints, None when it makes none; `by`: None when another rank was asked."""
    asked = f"asked to end ({by or 'on another rank'}) after step {step}"
    if folder is None:
        return f"{asked}; nothing is saved, because run.save_every_steps and save_every_minutes are null"
    return f"{asked}, saved in {folder}; the same command goes on from there"


class StopRequest:
    """From `listen` to `close` the process is not ended by what asks it to: `by` says what did ("SIGTERM"), or None.

    Outside of the main thread, where Python takes no handlers, nothing is listened to and `by` stays None.
    """

    def __init__(self):
        self.by: str | None = None
        self._before, self._reader, self._writer, self._interrupts = {}, -1, -1, 0

    def listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._ranks = _neighbours()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        self._before = {number: signal.signal(number, self._handle) for number in ASKING}
        self._thread = threading.Thread(target=self._listen, args=(self._reader,), daemon=True, name="stop request")
        self._thread.start()

    def close(self) -> None:
        if not self._before:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._writer, bytes(1))  # no signal: the thread ends
        self._thread.join()
        for end in (self._reader, self._writer):
            os.close(end)
        self._before = {}

    def _handle(self, number: int, frame) -> None:
        """In the main thread, when it gets there."""
        self._note(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt

    def _listen(self, reader: int) -> None:
        """In a thread of its own: at once, whatever the main thread is doing."""
        while number := os.read(reader, 1)[0]:
            if number == signal.SIGTERM and not all(map(is_there, self._ranks)):
                os._exit(128 + number)  # the step cannot end: a rank is missing
            if number in ASKING:
                self._note(number)

    def _note(self, number: int) -> None:
        if self.by is None:
            self.by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
