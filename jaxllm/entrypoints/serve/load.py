"""How much a server has taken on, and when it takes no more."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from jaxllm.entrypoints.openai.errors import APIError

#: seconds after which a client may try again
RETRY_AFTER = 1
#: of one call, whatever else there is: each takes memory as soon as it waits
MOST_SEQUENCES = 16384


class Load:
    """Counts calls and sequences under way.

    Args:
        running: sequences that the engine runs at once.
        waiting: that may wait beside them; None: any number.
    """

    def __init__(self, running: int, waiting: int | None):
        self._most = None if waiting is None else running + waiting
        self.calls = 0
        self.sequences = 0

    @contextlib.contextmanager
    def taken(self, sequences: int) -> Iterator[None]:
        """While it lasts, a call of so many sequences is under way.

        Raises APIError, of status 503, where there is no room; a server without a call takes any. Status 400: it is
        more than `MOST_SEQUENCES`.
        """
        if sequences > MOST_SEQUENCES:
            raise APIError(
                f"A call may have {MOST_SEQUENCES} sequences (prompts times n), and this one has {sequences}."
            )
        if self._most is not None and self.calls and self.sequences + sequences > self._most:
            raise APIError(
                f"The server is full: {self.sequences} sequences run or wait, and {self._most} may. Try again later.",
                status=503,
                retry_after=RETRY_AFTER,
            )
        self.calls += 1
        self.sequences += sequences
        try:
            yield
        finally:
            self.calls -= 1
            self.sequences -= sequences
