"""How far a run is: a bar on a terminal, a line now and then in a log; questions a second and the time left in both.

With several processes one of them shows the progress of all.
"""

import sys
import time

__all__ = ["Progress"]

LOG_EVERY_SECONDS = 60.0


class Progress:
    """Shows how many of `total` questions are done; `done` at the start do not count for the rate. visible=False shows nothing."""

    def __init__(self, total: int, done: int, *, visible: bool = True, file=None):
        self.total, self.began_with = total, done
        self.file = sys.stderr if file is None else file
        self.bar = None
        if visible and self.file.isatty():
            from tqdm import tqdm

            self.bar = tqdm(total=total, initial=done, unit="question", file=self.file, dynamic_ncols=True)
        self.logs = visible and self.bar is None
        self.began = self.logged = time.monotonic()

    def show(self, done: int) -> None:
        """`done` questions have an answer by now."""
        if self.bar is not None:
            self.bar.update(done - self.bar.n)
        elif self.logs and time.monotonic() - self.logged >= LOG_EVERY_SECONDS:
            self.logged = time.monotonic()
            print(self.line(done, self.logged - self.began), file=self.file, flush=True)

    def line(self, done: int, seconds: float) -> str:
        """What stands in a log after so many seconds."""
        rate = (done - self.began_with) / seconds if seconds > 0 else 0.0
        left = f"{_duration((self.total - done) / rate)} left" if rate > 0 else "time left unknown"
        return f"{done:,} of {self.total:,} questions, {rate:.1f} questions/s, {left}"

    def close(self) -> None:
        """The bar stays as it is."""
        if self.bar is not None:
            self.bar.close()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {seconds:02d} s" if minutes else f"{seconds} s"
