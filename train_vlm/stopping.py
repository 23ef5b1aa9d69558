"""A run that is asked to end: it finishes its step, saves, and ends with exit code 4, so that the same command goes on from there.

Asked by SIGUSR1 (`python -m train_vlm.stop OUT`), SIGTERM (a launcher, `kill`), SIGHUP (a terminal that is closed), the first Ctrl-C, or by
the end of a launcher (ending_together.py). A second Ctrl-C, or a second SIGTERM after PATIENT_SECONDS, ends it at once. Whichever rank
hears of it, all end at the same step (`train_step`).

Launchers send SIGTERM for another reason, too: a rank has died, and the others must not wait for it. Python's own handlers would not do
then, for they wait until the main thread comes back from its collective, which it never does. So a thread listens, and a rank whose
neighbour is gone ends at once.
"""

import contextlib
import os
import signal
import threading
import time
from pathlib import Path

from train_vlm.ending_together import is_there, launchers_above

__all__ = ["AskedToStop", "StopRequest", "stopped_words"]

ASKING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP") if hasattr(signal, name))
PATIENT_SECONDS = 5.0  # a scheduler and a launcher send one each, and mean the same
MAIN_THREAD_SECONDS = 2.0  # for the main thread to hear of a second Ctrl-C


class AskedToStop(Exception):  # noqa: N818 (no error)
    """The run ended before its last step because it was asked to; str() says where it stands. is_saved: whether it can go on from there."""

    def __init__(self, words: str, *, is_saved: bool):
        super().__init__(words)
        self.is_saved = is_saved


def _neighbours() -> list | None:
    """The other ranks that this one's launcher started here, as psutil's processes; None when some of them are gone already."""
    expected = int(os.environ.get("LOCAL_SIZE") or os.environ.get("LOCAL_WORLD_SIZE") or "1") - 1  # DeepSpeed's, torchrun's
    if expected < 1 or not (above := launchers_above()):
        return []
    import psutil

    found = []
    for process in above[0].children():
        with contextlib.suppress(psutil.Error):  # gone while it was asked
            given = process.environ()
            if process.pid != os.getpid() and "LOCAL_RANK" in given and given.get("MASTER_PORT") == os.environ.get("MASTER_PORT"):
                found.append(process)
    return found if len(found) >= expected else None


def stopped_words(step: int, folder: Path | None, by: str | None) -> str:
    """What a run that ended early says. `folder`: of its checkpoints, None when it makes none; `by`: None when another rank was asked."""
    asked = f"asked to end ({by or 'on another rank'}) after step {step}"
    if folder is None:
        return f"{asked}; nothing is saved, because run.save_every_steps and save_every_minutes are null"
    return f"{asked}, saved in {folder}; the same command goes on from there"


class StopRequest:
    """From `listen` to `close` the process is not ended by what asks it to: `by` says what did ("SIGTERM"), or None. What the process was
    started to ignore is ignored as before. Until `is_under_way` is set there is nothing to save, and the first Ctrl-C ends it.

    Outside of the main thread, where Python takes no handlers, nothing is listened to and `by` stays None.
    """

    def __init__(self):
        self.by: str | None = None
        self.is_under_way = False
        self._needs_ranks = True
        self._before, self._reader, self._writer = {}, -1, -1
        self._interrupts, self._is_interrupted, self._terminated = 0, threading.Event(), None

    def listen(self) -> None:
        if threading.current_thread() is not threading.main_thread():
            return
        self._ranks = _neighbours()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._fd_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        taken = [number for number in ASKING if signal.getsignal(number) is not signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._handle) for number in taken}
        self._thread = threading.Thread(target=self._listen, args=(self._reader,), daemon=True, name="stop request")
        self._thread.start()

    def needs_no_ranks(self) -> None:
        """From now on other ranks may end before this one."""
        self._needs_ranks = False

    def close(self) -> None:
        if self._reader < 0:
            return
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        os.write(self._writer, bytes(1))  # no signal: the thread ends
        self._thread.join()
        for end in (self._reader, self._writer):
            os.close(end)
        self._reader = -1

    def _handle(self, number: int, frame) -> None:
        """In the main thread, when it gets there."""
        self._note(number)
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > self.is_under_way:
                self._is_interrupted.set()
                raise KeyboardInterrupt

    def _listen(self, reader: int) -> None:
        """In a thread of its own: at once, whatever the main thread is doing."""
        interrupts = 0
        while number := os.read(reader, 1)[0]:
            if number == signal.SIGTERM and self._must_end_now():
                os._exit(128 + number)
            interrupts += number == signal.SIGINT
            if number == signal.SIGINT and interrupts > self.is_under_way and not self._is_interrupted.wait(MAIN_THREAD_SECONDS):
                os._exit(128 + number)
            if number in self._before:
                self._note(number)

    def _must_end_now(self) -> bool:
        """The step cannot end, because a rank is missing, or somebody asks again."""
        if self._needs_ranks and (self._ranks is None or not all(map(is_there, self._ranks))):
            return True
        first, self._terminated = self._terminated, self._terminated or time.monotonic()
        return first is not None and time.monotonic() - first > PATIENT_SECONDS

    def _note(self, number: int) -> None:
        if self.by is None:
            self.by = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
