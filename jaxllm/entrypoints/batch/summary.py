"""This says how a batch goes, by counts, a progress bar and a last line."""

from __future__ import annotations

import threading
import time
from typing import Any

_REFRESH_SECONDS = 0.5


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
