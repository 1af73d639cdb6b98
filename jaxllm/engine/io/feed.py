"""The prompts of one call on their way into the engine and out of it again, however many they are."""

from __future__ import annotations

import collections
import concurrent.futures
import itertools
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence, Sized
from typing import TYPE_CHECKING, Any, NamedTuple

from jaxllm.api import checks
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput, failed_output, was_refused
from jaxllm.api.pooling_params import PoolingParams
from jaxllm.api.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.engine.interrupt import DeferredInterrupt
from jaxllm.engine.io.input_processor import CheckedParams, InputProcessor
from jaxllm.engine.io.prompt_source import ReadySource, WaitingSource
from jaxllm.engine.io.prompts import PreparedPrompt, Prompt, TokenizationOptions, holds_media
from jaxllm.multimodal.conversations import has_media
from jaxllm.tokenization.pool import BATCH, TokenizerPool

if TYPE_CHECKING:
    from concurrent.futures import Future

    from jaxllm.api.lora_request import LoRARequest
    from jaxllm.engine.client import EngineClient
    from jaxllm.engine.io.pooling_inputs import PoolingInputs
    from jaxllm.engine.observe.progress import Progress

_END = object()


class Job(NamedTuple):
    """One prompt of the call."""

    index: int
    prompt: Prompt
    params: Any
    priority: Any
    lora_request: Any


class Feed:
    """Runs the prompts of one call: reads them as there is room, tokenizes them in the pool, collects the outputs.

    At most `window` prompts are read and unfinished at any time, so an endless source needs bounded memory.

    Args:
        prompts: what has no length is read by a thread of its own.
        params: one for all, or one each.
        priority, lora_request: one for all, or one each.
        window: prompts.
        on_error: "raise" or "return".
        convert: makes the prompt of what the caller gave (a conversation).
        check_first: with "raise", begin only when all prompts of the window have been read and found good.
        lockstep: read and add the same prompts between the same steps each time (`SchedulerConfig.lockstep`).

    Raises:
        ValidationError: lengths that differ, where they are known.
    """

    def __init__(
        self,
        client: EngineClient,
        inputs: InputProcessor | PoolingInputs,
        pool: TokenizerPool,
        prompts: Iterable[Any],
        params: SamplingParams | PoolingParams | Iterable[SamplingParams | PoolingParams],
        *,
        priority: int | Iterable[int] | None = None,
        lora_request: LoRARequest | Iterable[LoRARequest | None] | None = None,
        window: int,
        on_error: str = "raise",
        options: TokenizationOptions | None = None,
        convert: Callable[[Any], Prompt] | None = None,
        check_first: bool = True,
        lockstep: bool = False,
    ):
        if on_error not in ("raise", "return"):
            raise ValidationError(f'on_error must be "raise" or "return", got {on_error!r}')
        self._client, self._inputs, self._pool = client, inputs, pool
        jobs = jobs_of(prompts, params, 0 if priority is None else priority, lora_request)
        ready = isinstance(prompts, Sized)
        self._source = ReadySource(jobs) if ready or lockstep else WaitingSource(jobs, window)
        self._lockstep = lockstep
        self._window = window
        self._raise = on_error == "raise"
        self._options = options
        self._convert = convert
        #: how errors name one of several prompts; "": there is one
        self._name = "" if ready and len(prompts) == 1 else "prompts" if convert is None else "messages"
        self._check_first = check_first and self._raise and ready
        #: equal parameters, one after the other, are checked once: these, and what came of them
        self._last: tuple[SamplingParams, CheckedParams] | None = None
        #: parameters that all prompts share are checked once
        self._shared = self._check(params) if isinstance(params, (SamplingParams, PoolingParams)) else None
        self._preparing: collections.deque[tuple[list[Job], Future[list[PreparedPrompt | ValidationError]]]]
        self._preparing = collections.deque()
        #: request id -> index of its prompt
        self._running: dict[str, int] = {}
        # two counters: steps of other threads finish prompts, this call's thread reads them
        self.num_read = self._num_finished = 0
        #: outputs that nobody has taken, in the order of completion
        self._finished: collections.deque[RequestOutput] = collections.deque()

    @property
    def _unfinished(self) -> int:
        return self.num_read - self._num_finished

    @property
    def done(self) -> bool:
        """Whether every prompt has been read and has its output."""
        return self._source.exhausted and not self._unfinished

    def outputs(self, progress: Progress | None = None) -> Generator[Any, None, None]:
        """Run the prompts to their end; yields each output when it is finished. Closing it ends what still runs.

        Raises:
            ValidationError: a prompt is refused, with ``on_error="raise"``.
            RuntimeError: the engine failed or was shut down by another call.
        """
        try:
            while not self.done or self._finished:
                self._advance()
                if progress is not None:
                    progress.tick()
                while self._finished:
                    output = self._finished.popleft()
                    if output.error is not None and self._raise:
                        if was_refused(output):
                            raise ValidationError(self._of(output.index, output.error))
                        raise RuntimeError(output.error)  # a replica's, or of another call's step
                    if progress is not None:
                        progress.finished(output)
                    yield output
        finally:
            self.close()

    def _advance(self) -> None:
        """Read and add what there is room for, then run one step of the engine."""
        self._read()
        self._wait_for_first()
        # an interrupt in the middle of a step would leave half-made bookkeeping behind
        with DeferredInterrupt():
            self._add_ready()
            if self._running:
                with self._client.lock:
                    # while this thread waited for the lock, another one's steps may have brought what is left
                    if self._running:
                        if self._preparing:
                            self._client.core.prompts_are_missing()
                        self._client.step()

    def submit(self) -> list[str]:
        """Read and add every prompt, without running anything; the window has to hold them all.

        Returns:
            The request ids, in the order of the prompts.

        Raises:
            ValidationError: a prompt is refused.
        """
        self._check_first = True
        while not self._source.exhausted:
            self._read()
        self._wait_for_first()
        self._add_ready()
        return list(self._running)

    def close(self) -> None:
        """End what runs. What is in the pool is dropped when it is ready."""
        self._source.close()
        for _, future in self._preparing:
            future.cancel()
        self._preparing.clear()
        ids = list(self._running)
        self._running.clear()
        self._client.end(ids)

    # Prompts in.

    def _read(self) -> None:
        """Give prompts to the pool, a batch at a time, while there is room; wait for one only when nothing runs."""
        while not self._source.exhausted and self._unfinished < self._window:
            idle = not (self._running or self._preparing or self._finished)
            batch = self._source.take(min(BATCH, self._window - self._unfinished), wait=idle)
            if self._client.agreement is not None:
                self._client.agreement.check_jobs(batch, self.num_read, is_all=self._source.exhausted)
            if not batch:
                return
            self.num_read += len(batch)
            for slow, jobs in itertools.groupby(batch, self._is_slow):
                # pictures take long: each prompt begins when its own are there, and they are read beside each other
                for own in ([job] for job in jobs) if slow else (list(jobs),):
                    self._preparing.append((own, self._pool.submit(self._prepare, own, slow=slow)))

    def _is_slow(self, job: Job) -> bool:
        return holds_media(job.prompt) or (self._convert is not None and has_media(job.prompt))

    def _wait_for_first(self) -> None:
        """Wait for the pool when there is nothing else to do, or when others add the same prompts."""
        every = self._check_first or self._lockstep
        for _, future in self._preparing if every else itertools.islice(self._preparing, 1):
            if every or not self._running:
                start = time.perf_counter()
                concurrent.futures.wait([future])
                if not self._running:
                    self._client.core.waited_for_prompts(time.perf_counter() - start)

    def _prepare(self, jobs: Sequence[Job]) -> list[PreparedPrompt | ValidationError]:
        prompts = [job.prompt for job in jobs]
        if self._convert is not None:
            prompts = [self._convert(prompt) for prompt in prompts]
        return self._inputs.reader.read(prompts, self._options)

    def _add_ready(self) -> None:
        """Add the prompts that the pool is through with."""
        while self._preparing and self._preparing[0][1].done():
            jobs, future = self._preparing.popleft()
            with self._client.lock:
                for job, prompt in zip(jobs, future.result(), strict=True):
                    self._add(job, prompt)
        self._check_first = False

    def _add(self, job: Job, prompt: PreparedPrompt | ValidationError) -> None:
        request_id = self._client.next_id()
        try:
            if isinstance(prompt, ValidationError):
                raise prompt
            params, priority = self._shared or self._check(job.params), checks.integer("priority", job.priority)
            request, text = self._inputs.request(request_id, prompt, params, priority, job.lora_request)
            self._running[request_id] = job.index
            self._client.add(request, text, self._receive)
        except ValidationError as error:
            self._running.pop(request_id, None)
            self._client.core.record_rejection("invalid")
            if self._raise:
                raise ValidationError(self._of(job.index, str(error))) from error.__cause__
            text = job.prompt if isinstance(job.prompt, str) else None
            self._finish(failed_output(request_id, text, str(error)), job.index)

    def _of(self, index: int, reason: str) -> str:
        """The reason, and of which prompt it is."""
        return f"{self._name}[{index}]: {reason}" if self._name else reason

    def _check(self, params: Any) -> Any:
        if not isinstance(params, SamplingParams):
            return self._inputs.check(params)
        if self._last is not None and params == self._last[0]:
            return self._last[1]
        own, final = params.clone(), params.clone()
        final.output_kind = RequestOutputKind.FINAL_ONLY
        inputs: Any = self._inputs
        checked = inputs.check(final)
        self._last = own, checked
        return checked

    # Outputs out.

    def _receive(self, output: RequestOutput) -> None:
        if output.finished:
            index = self._running.pop(output.request_id, None)
            if index is not None:
                self._finish(output, index)

    def _finish(self, output: RequestOutput, index: int) -> None:
        output.index = index
        self._num_finished += 1
        self._finished.append(output)
        self._source.finished()


def jobs_of(prompts: Iterable[Any], params: Any, priority: Any, lora_request: Any = None) -> Iterator[Job]:
    """The prompts with what belongs to each. Raises ValidationError as soon as lengths are known to differ."""
    columns: dict[str, Iterator[Any]] = {}
    for name, values, single in (
        ("params", params, (SamplingParams, Mapping)),
        ("priority", priority, (int, str)),
        ("lora_request", lora_request, (str, Mapping)),
    ):
        if isinstance(values, single) or not isinstance(values, Iterable):
            columns[name] = itertools.repeat(values)
            continue
        if isinstance(prompts, Sized) and isinstance(values, Sized) and len(prompts) != len(values):
            raise ValidationError(_different(len(prompts), name, len(values)))
        columns[name] = iter(values)
    return _zip(prompts, columns)


def _zip(prompts: Iterable[Any], columns: dict[str, Iterator[Any]]) -> Iterator[Job]:
    count = 0
    for prompt in prompts:
        values = []
        for name, column in columns.items():
            values.append(next(column, _END))
            if values[-1] is _END:
                raise ValidationError(_different(count + 1, name, count, "at least "))
        yield Job(count, prompt, *values)
        count += 1
    for name, column in columns.items():
        if not isinstance(column, itertools.repeat) and next(column, _END) is not _END:
            raise ValidationError(f"There are {count} prompts, and more {name} than that.")


def _different(prompts: int, name: str, values: int, least: str = "") -> str:
    return f"The lengths of prompts ({least}{prompts}) and {name} ({values}) must be the same."
