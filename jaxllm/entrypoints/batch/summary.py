"""This says how a batch goes, by counts, a progress bar or lines of it, and a last line."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

_REFRESH_SECONDS = 0.5
#: between two lines, where no terminal shows the bar
LINE_SECONDS = 30.0


class Tally:
    """What became of the lines, with a progress bar when `show`.

    Args:
        total: lines of the input; None: unknown.
    """

    def __init__(self, total: int | None, *, show: bool):
        from tqdm import tqdm

        self.completed = self.failed = self.skipped = 0
        self.prompt_tokens = self.output_tokens = 0
        # lines are refused where they are read, and completed where the engine is driven
        self._lock = threading.Lock()
        self._total = total
        self._start = self._shown = time.monotonic()
        self._bar = tqdm(total=total, unit=" lines", desc="run-batch", disable=not show, dynamic_ncols=True)

    def skip(self) -> None:
        """Count a line that an earlier run finished."""
        with self._lock:
            self.skipped += 1
            self._advance()

    def fail(self) -> None:
        with self._lock:
            self.failed += 1
            self._advance()

    def complete(self, usage: dict[str, Any]) -> None:
        with self._lock:
            self.completed += 1
            self.prompt_tokens += usage["prompt_tokens"]
            self.output_tokens += usage["completion_tokens"]
            self._advance()

    def _advance(self) -> None:
        if self._bar.disable:
            return
        now = time.monotonic()
        if now - self._shown > _REFRESH_SECONDS:
            self._shown = now
            seconds = now - self._start
            self._bar.set_postfix_str(
                f"{self.failed} failed, {self.skipped} skipped, {self.output_tokens / seconds:.0f} output tokens/s",
                refresh=False,
            )
        self._bar.update()

    @contextlib.contextmanager
    def told_regularly(self, wait: Callable[[threading.Event], bool] | None = None) -> Iterator[None]:
        """While it lasts, and the bar is not shown, a line on standard error says every 30 seconds how it goes.

        Args:
            wait: waits until the next line is due; True: the event is set, and there is none.
        """
        if not self._bar.disable:
            yield
            return
        done = threading.Event()
        thread = threading.Thread(target=self._tell, args=(done, wait or _until_due), name="progress", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    def _tell(self, done: threading.Event, wait: Callable[[threading.Event], bool]) -> None:
        while not wait(done):
            print(f"run-batch: {self.progress()}", file=sys.stderr, flush=True)

    def progress(self) -> str:
        """How many lines there are a result of, and how long the rest may take."""
        seen = self.completed + self.failed + self.skipped
        new, seconds = self.completed + self.failed, time.monotonic() - self._start
        if self._total is None:
            return f"{seen} lines; {self}"
        left = ""
        if new and seen < self._total:
            left = f", about {_duration((self._total - seen) * seconds / new)} left"
        return f"{seen} of {self._total} lines{left}; {self}"

    def close(self) -> None:
        self._bar.close()

    def __str__(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        lines = self.completed + self.failed
        parts = [f"{self.completed} completed", f"{self.failed} failed"]
        if self.skipped:
            parts.append(f"{self.skipped} finished before")
        return (
            f"{', '.join(parts)}; {seconds:.1f} s, {lines / seconds:.1f} lines/s, "
            f"{self.prompt_tokens} prompt tokens, {self.output_tokens} output tokens "
            f"({self.output_tokens / seconds:.1f}/s)"
        )


def _until_due(done: threading.Event) -> bool:
    return done.wait(LINE_SECONDS)


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{seconds / 3600:.1f} h"
