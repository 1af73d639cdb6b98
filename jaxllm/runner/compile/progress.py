"""How far a start is, said while it lasts: programs that are there, of how many, and when it may be over."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

from tqdm import tqdm

from jaxllm.engine.interrupt import StartInterrupt

Result = TypeVar("Result")

logger = logging.getLogger("jaxllm")

#: seconds between two lines of the log
LINE_INTERVAL = 5.0
#: seconds between two looks at whether the start is still wanted
LOOK_INTERVAL = 0.1


class StartProgress:
    """Shows a bar on a terminal, and writes lines into the log elsewhere.

    Args:
        quiet: nothing is said.
        on_terminal: whether there is a terminal that shows bars.
        expected: seconds that the last start like this one took, by whether programs were compiled in it.
        interrupt: ends the start.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        quiet: bool = False,
        on_terminal: bool = False,
        expected: dict[bool, float] | None = None,
        interrupt: StartInterrupt | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._quiet, self.on_terminal = quiet, on_terminal and not quiet
        self._expected, self._clock = expected or {}, clock
        self._interrupt = interrupt or StartInterrupt()
        self._began = self._said = clock()
        self._seconds: float | None = None
        self._bar: tqdm[Any] | None = None
        self._has_begun = False
        #: what is done beside the start, and ends it where it fails
        self._needed: list[concurrent.futures.Future[Any]] = []
        #: whether programs were compiled, or may have been
        self.compiles = False

    def begin(self, total: int, missing: int | None) -> None:
        """Say what there is to do; once.

        Args:
            total: number of programs.
            missing: those that the compile cache does not have; None: nobody knows.
        """
        self.compiles = self.compiles or missing != 0
        if self._has_begun or self._quiet:
            return
        self._has_begun, self._said = True, self._clock()
        self._seconds = self._expected.get(self.compiles)
        if missing is None:
            what = f"Compiling {total} programs, or loading those that JAX's compile cache has"
        elif missing:
            what = f"Compiling {missing} of {total} programs, and keeping them for the next start"
        else:
            what = f"Loading {total} programs from the compile cache"
        last = "" if self._seconds is None else f"; the last start like this one took {self._seconds:.0f} s"
        logger.info("%s%s", what, last)

    def programs(self, done: int, total: int) -> None:
        """So many programs are there."""
        if self._quiet:
            return
        now = self._clock()
        # a start that takes longer is none like the last one
        is_like_last = self._seconds is not None and now - self._began <= self._seconds
        expected = f" of about {self._seconds:.0f}" if is_like_last else ""
        if self.on_terminal:
            form = "{n_fmt} of {total_fmt} programs |{bar}| {elapsed}" + (f"{expected} s" if expected else "")
            if self._bar is None:
                self._bar = tqdm(total=total, bar_format=form, leave=False)
            self._bar.total, self._bar.n, self._bar.bar_format = total, done, form
            self._bar.refresh()
            return
        if now - self._said >= LINE_INTERVAL:
            self._said = now
            logger.info("%d of %d programs, %.0f%s s", done, total, now - self._began, expected)

    def ends_with(self, future: concurrent.futures.Future[Any]) -> None:
        """The start ends where `future` fails, whatever it waits for."""
        self._needed.append(future)

    def check(self) -> None:
        """Raise KeyboardInterrupt where the start is to end, and what something that it needs has failed with."""
        self._interrupt.check()
        for future in [future for future in self._needed if future.done()]:
            # its result is others' alone
            self._needed.remove(future)
            future.result()

    def result(self, future: concurrent.futures.Future[Result]) -> Result:
        """A future's result, waited for as long as the start is wanted."""
        for _ in self.wait([future], lambda: None):
            pass
        return future.result()

    def wait(
        self, futures: Collection[concurrent.futures.Future[Any]], still: Callable[[], object]
    ) -> Iterator[concurrent.futures.Future[Any]]:
        """The futures as they are done; `still` is called in between, and now and then where none is."""
        pending = set(futures)
        self._interrupt.is_polled = True
        try:
            while pending:
                done, pending = concurrent.futures.wait(
                    pending, timeout=LOOK_INTERVAL, return_when=concurrent.futures.FIRST_COMPLETED
                )
                self.check()
                yield from done
                still()
        finally:
            self._interrupt.is_polled = False

    def close(self) -> None:
        """The start is over: nothing is shown any more, and nothing ends it. Idempotent."""
        self._quiet, self._interrupt, self._needed = True, StartInterrupt(), []
        if self._bar is not None:
            self._bar.close()
            self._bar = None


@dataclasses.dataclass
class Tally:
    """Programs that are made in several parts, one after the other."""

    #: of all parts
    total: int = 0
    #: part -> those that are there
    done: dict[int, int] = dataclasses.field(default_factory=dict)


class PartProgress(StartProgress):
    """How far one part of the programs is, told as part of all of them.

    Args:
        whole: shows it. Whoever makes the parts tells it of the beginning.
        part: of the tally.
    """

    def __init__(self, whole: StartProgress, tally: Tally, part: int):
        super().__init__(quiet=True)
        self._whole, self._tally, self._part = whole, tally, part

    def begin(self, total: int, missing: int | None) -> None:
        """Nothing: the whole has begun."""

    def programs(self, done: int, total: int) -> None:
        self._tally.done[self._part] = done
        self._whole.programs(sum(self._tally.done.values()), self._tally.total)

    def check(self) -> None:
        self._whole.check()

    def wait(
        self, futures: Collection[concurrent.futures.Future[Any]], still: Callable[[], object]
    ) -> Iterator[concurrent.futures.Future[Any]]:
        return self._whole.wait(futures, still)
