"""One engine of a pool: the actor that it is in, what it has been asked, and what becomes of both when it dies."""

from __future__ import annotations

import heapq
import logging
from collections.abc import Callable, Generator, Sequence
from typing import Any

from jaxllm.api.errors import JaxLLMError
from jaxllm.api.outputs import RequestOutput, failed_output
from jaxllm.engine.io.feed import Job

logger = logging.getLogger(__name__)

#: starts that a process may die in, one after the other, before the engine is given up
_MOST_STARTS = 3
#: engines that a prompt may have ended, at least, when it is to blame
_BLAMED = 3
#: seconds after which whoever waits for a start is told what it waits for
_PATIENCE = 30.0


class Task:
    """A prompt of the call, on its way to its answer. Ordered as the prompts are."""

    def __init__(self, job: Job, seed: int, options: dict[str, Any]):
        self.job, self.seed, self.options = job, seed, options
        #: engines that died while they had it
        self.deaths = 0

    def __lt__(self, other: Task) -> bool:
        return self.job.index < other.job.index


class PooledEngine:
    """An engine that is started anew when it dies.

    Of the prompts that an engine had when it died, one may be the cause. They are done again: at first as they were,
    since most often it is something else, then with ever fewer others in one engine, at last alone. One that is alone
    when an engine dies, not for the first time, is to blame.

    Args:
        create: makes an actor.
        arguments: of the engine.
    """

    def __init__(self, ray: Any, number: int, create: Callable[[], Any], arguments: dict[str, Any]):
        self._ray, self._number, self._create, self._arguments = ray, number, create, arguments
        #: what has been asked, by the reference of its answer
        self.tasks: dict[Any, Task] = {}
        #: why it is given up
        self.failure: BaseException | None = None
        #: most tasks that it is given: enough to keep it busy
        self.most = 0
        self._deaths_in_start = 0
        self._begin()

    def _begin(self) -> None:
        self._actor = self._create()
        #: of its start, while that lasts
        self._starting: Any = self._actor.start.remote(self._arguments)

    @property
    def is_up(self) -> bool:
        """Whether it can be asked."""
        return self._starting is None and self.failure is None

    @property
    def refs(self) -> list[Any]:
        """What is waited for."""
        return [*self.tasks, *([] if self._starting is None else [self._starting])]

    def load(self) -> int:
        return len(self.tasks)

    def takes(self, task: Task | None) -> bool:
        """Whether there is room for a task, beside those that it has; None: one that has seen no engine die."""
        deaths = max([0 if task is None else task.deaths, *(other.deaths for other in self.tasks.values())])
        # an eighth after each death but the first
        return len(self.tasks) < max(self.most >> 3 * max(deaths - 1, 0), 1)

    def give(self, task: Task) -> None:
        ref = self._actor.answer.remote(task.job.prompt, task.job.params, task.seed, task.options)
        self.tasks[ref] = task

    def wait_for_start(self) -> None:
        """Wait until it has started.

        Raises:
            JaxLLMError, RuntimeError: it cannot.
        """
        while self._starting is not None:
            if self._ray.wait([self._starting], timeout=_PATIENCE)[0]:
                self._see_start()
            else:
                free = self._ray.available_resources()
                logger.info("Engine %d has not started yet; of the cluster %s is free", self._number, free)
        if self.failure is not None:
            raise self.failure

    def take(self, finished: Sequence[Any], again: list[Task]) -> Generator[tuple[Task, RequestOutput], None, None]:
        """The outputs among what is finished; when it has died, those of tasks that are to blame. What else it had goes
        to the heap `again`, and it starts anew.
        """
        if self._starting in finished:
            self._see_start()
        death: BaseException | None = None
        for ref in [ref for ref in self.tasks if ref in finished]:
            try:
                output = self._ray.get(ref)
            except self._ray.exceptions.RayError as error:
                death = error
            else:
                yield self.tasks.pop(ref), output
        if death is None:
            return
        lost, self.tasks = list(self.tasks.values()), {}
        reason = _reason(death)
        logger.warning("Engine %d died, and is started anew; it had %d prompts: %s", self._number, len(lost), reason)
        self._ray.kill(self._actor)
        self._begin()
        for task in lost:
            task.deaths += 1
            if len(lost) > 1 or task.deaths < _BLAMED:
                heapq.heappush(again, task)
                continue
            prompt = task.job.prompt if isinstance(task.job.prompt, str) else None
            text = f"{task.deaths} engines died while they had this prompt, the last one with no other: {reason}"
            yield task, failed_output("", prompt, text)

    def _see_start(self) -> None:
        """See how the start went; one in which the process died is tried again."""
        try:
            most = self._ray.get(self._starting)
        except self._ray.exceptions.RayTaskError as error:
            # what the engine says itself, it would say again
            own = getattr(error, "cause", None)
            self._give_up(own if isinstance(own, (JaxLLMError, TypeError)) else _failed(self._number, _reason(error)))
        except self._ray.exceptions.RayError as error:
            self._deaths_in_start += 1
            if self._deaths_in_start < _MOST_STARTS:
                logger.warning("Engine %d died while it started, and is started anew: %s", self._number, _reason(error))
                self._begin()
            else:
                self._give_up(_failed(self._number, f"its process died in {_MOST_STARTS} starts: {_reason(error)}"))
        else:
            # as many again wait in it as run
            self.most, self._starting, self._deaths_in_start = 2 * most, None, 0

    def _give_up(self, failure: BaseException) -> None:
        logger.error("Engine %d is given up: %s", self._number, failure)
        self.failure, self._starting = failure, None

    def cancel(self) -> None:
        """End what it has been asked."""
        for ref in self.tasks:
            self._ray.cancel(ref)
        self.tasks = {}

    def end(self) -> None:
        """End its process."""
        self.tasks = {}
        self._ray.kill(self._actor)


def _failed(number: int, reason: str) -> RuntimeError:
    return RuntimeError(f"engine {number} cannot start: {reason}")


def _reason(error: BaseException) -> str:
    """The last line of what Ray says, which may be a page."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
