"""Advice that nobody asked for: a line at the end of a call in which something hurt."""

from __future__ import annotations

import contextlib
import logging
import math
import time
import weakref
from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxllm.api.metric import since

if TYPE_CHECKING:
    from jaxllm.api.metric import Metric
    from jaxllm.engine.engine import Engine

logger = logging.getLogger("jaxllm")

#: seconds between two looks at an engine, which take some tenths of a millisecond
PAUSE = 0.05


class Notice:
    """What an engine's calls are told, of each kind of advice once.

    Args:
        engine: that is called; this does not keep it alive.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = weakref.ref(engine)
        self._told: set[str] = set()
        #: the engine's metrics at the last look, and when that was
        self._before: list[Metric] = []
        self._looked = -math.inf

    @contextlib.contextmanager
    def of_call(self) -> Iterator[None]:
        """Lasts as long as a call, and looks at the engine when that has ended well. What hurts in calls that follow
        each other quickly is told after one of them.
        """
        yield
        engine = self._engine()
        if engine is not None and time.monotonic() - self._looked >= PAUSE:
            self._look(engine)
            self._looked = time.monotonic()

    def _look(self, engine: Engine) -> None:
        # the first token needs none of it
        from jaxllm.tuning.advice.advise import advise
        from jaxllm.tuning.advice.load import Load

        now = engine.core.metrics()
        metrics, self._before = tuple(since(self._before, now)), now
        for advice in advise(Load(settings=engine.watching.settings, metrics=metrics)):
            if advice.kind not in self._told:
                self._told.add(advice.kind)
                others = "".join(f", or {other}" for other in advice.instead)
                logger.info("Advice (%s): %s. Set %s%s.", advice.kind, advice.evidence, advice.setting, others)
