"""`EnginePool`: engines on a Ray cluster that answer the prompts of one call together, also when some of them die."""

from __future__ import annotations

import contextlib
import functools
import heapq
import os
import threading
import weakref
from collections.abc import Callable, Generator, Iterable, Mapping, Sized
from typing import Any, ClassVar

from jaxllm.api.errors import ValidationError
from jaxllm.api.method_arguments import with_params
from jaxllm.api.outputs import RequestOutput, was_refused
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.api.tracebacks import short_tracebacks
from jaxllm.config.argument_checks import at_least
from jaxllm.config.log import show_log
from jaxllm.engine.io.call_prompts import as_conversations, as_prompts, chat_prompt
from jaxllm.engine.io.feed import jobs_of
from jaxllm.engine.io.input_processor import seed_of
from jaxllm.engine.io.prompt_source import ReadySource, WaitingSource
from jaxllm.engine.io.prompts import Prompt
from jaxllm.engine.observe.progress import Progress
from jaxllm.ray.cluster import connect, environment, import_ray, machines, resources, worker_arguments
from jaxllm.ray.pooled_engine import PooledEngine, Task
from jaxllm.tokenization.chat import Conversation

#: seconds between two looks at what comes in, where nothing does
_LOOK = 0.2
#: that an actor may work on, of which it is given no more than its engine has use for
_MOST_CALLS = 2**16

OnOutput = Callable[[RequestOutput], object]
Params = SamplingParams | Iterable[SamplingParams] | None


@short_tracebacks
class EnginePool:
    """Engines of one model in processes of a Ray cluster, behind `LLM`'s `generate` and `chat`.

    An engine whose process dies is started anew, and the prompts that it had are done again, here or there: each is
    answered once. A prompt that ends engines is found out, and gets an error. One call runs at a time; those of other
    threads wait for it.

    Args:
        model: as for `LLM`; a path has to be there on every machine.
        num_engines: processes with an engine each.
        num_cpus: that Ray reserves for each, and threads that it computes with on a CPU; None: an equal share of the
            cluster's processors, or 1 where there are GPUs.
        num_gpus: that Ray reserves for each; None: as many as the engine has devices, where the cluster has GPUs.
        ray_remote_args: further options of Ray's for the actors (``runtime_env``, ``resources``, ...).
        **kwargs: `LLM`'s engine arguments.

    Raises:
        JaxLLMError: ray is not installed.
        TypeError, ValidationError: as of `LLM`; or the cluster has no room for the engines.
        RuntimeError: the process of an engine died while it started.
    """

    #: those that are not shut down
    _alive: ClassVar[weakref.WeakSet[EnginePool]] = weakref.WeakSet()
    #: whether one of them has connected to the cluster
    _connected: ClassVar[bool] = False

    def __init__(
        self,
        model: str | os.PathLike[str],
        num_engines: int = 2,
        *,
        num_cpus: float | None = None,
        num_gpus: float | None = None,
        ray_remote_args: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ):
        show_log()
        ray = import_ray()
        count = at_least(1)("num_engines", num_engines)
        args, arguments = worker_arguments(model, kwargs)
        self._description = f"EnginePool({str(args.model)!r}, num_engines={count}"
        self._call, self._in_call = threading.RLock(), False
        self._engine_seed = args.seed
        #: requests so far, and those without a seed of their own
        self._num_requests = self._num_unseeded = 0
        self._engines: list[PooledEngine] = []
        if connect():
            EnginePool._connected = True
        EnginePool._alive.add(self)
        try:
            wanted = resources(machines(), args, count, num_cpus, num_gpus)
            create = functools.partial(_create, {**(ray_remote_args or {}), **wanted}, environment(wanted))
            self._engines = [PooledEngine(ray, number, create, arguments) for number in range(count)]
            for engine in self._engines:
                engine.wait_for_start()
        except BaseException:
            self.shutdown()
            raise

    def __repr__(self) -> str:
        return f"{self._description}{'' if self._engines else ', shut down'})"

    @with_params("sampling_params", SamplingParams)
    def generate(
        self,
        prompts: Prompt | Iterable[Prompt],
        sampling_params: Params = None,
        *,
        use_tqdm: bool | Callable[..., Any] = True,
        priority: int | Iterable[int] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        on_error: str = "raise",
        on_output: OnOutput | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts; the outputs come in the prompts' order. The arguments are those of `LLM.generate`.

        With ``on_error="raise"`` the first prompt that is refused ends the call, whenever that is. One that ends
        engines counts as refused.

        Raises:
            ValidationError: a prompt or its parameters are refused.
            RuntimeError: no engine is left.
        """
        return self._run(as_prompts(prompts), "prompts", sampling_params, priority, use_tqdm, on_error, on_output,
                         {"tokenization_kwargs": tokenization_kwargs})  # fmt: skip

    @with_params("sampling_params", SamplingParams)
    def chat(
        self,
        messages: Conversation | Iterable[Conversation],
        sampling_params: Params = None,
        use_tqdm: bool | Callable[..., Any] = True,
        *,
        priority: int | Iterable[int] | None = None,
        chat_template: str | None = None,
        chat_template_content_format: str = "auto",
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: list[dict[str, Any]] | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        on_error: str = "raise",
        on_output: OnOutput | None = None,
    ) -> list[RequestOutput]:
        """Answer one conversation, or many. The arguments are those of `LLM.chat`, and of `generate`."""
        convert = functools.partial(
            chat_prompt,
            chat_template=chat_template,
            chat_template_content_format=chat_template_content_format,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=tools,
            chat_template_kwargs=chat_template_kwargs,
        )
        conversations = as_conversations(messages)
        converted = map(convert, conversations)
        prompts = list(converted) if isinstance(conversations, Sized) else converted
        return self._run(prompts, "messages", sampling_params, priority, use_tqdm, on_error, on_output,
                         {"tokenization_kwargs": tokenization_kwargs})  # fmt: skip

    def _run(
        self,
        prompts: Iterable[Any],
        name: str,
        params: Params,
        priority: Any,
        use_tqdm: bool | Callable[..., Any],
        on_error: str,
        on_output: OnOutput | None,
        options: dict[str, Any],
    ) -> list[RequestOutput]:
        if on_error not in ("raise", "return"):
            raise ValidationError(f'on_error must be "raise" or "return", got {on_error!r}')
        jobs = jobs_of(prompts, params, 0 if priority is None else priority)
        total = len(prompts) if isinstance(prompts, Sized) else None
        kept: list[RequestOutput] = []
        with (
            self._one_call(),
            Progress(total, enabled=use_tqdm) as progress,
            contextlib.closing(self._outputs(jobs, total is not None, options, progress)) as outputs,
        ):
            for output in outputs:
                if output.error is not None and on_error == "raise":
                    kind = ValidationError if was_refused(output) else RuntimeError
                    raise kind(output.error if total == 1 else f"{name}[{output.index}]: {output.error}")
                progress.finished(output)
                (on_output or kept.append)(output)
        return sorted(kept, key=lambda output: output.index)

    @contextlib.contextmanager
    def _one_call(self) -> Generator[None, None, None]:
        with self._call:
            if self._in_call:
                raise RuntimeError("on_output was called by the pool, and cannot call it")
            if not self._engines:
                raise RuntimeError("the pool has been shut down; make a new EnginePool")
            self._in_call = True
            try:
                yield
            finally:
                self._in_call = False

    def _outputs(
        self, jobs: Iterable[Any], ready: bool, options: dict[str, Any], progress: Progress
    ) -> Generator[RequestOutput, None, None]:
        """Each output when it is finished. Closing it ends what still runs."""
        ray = import_ray()
        tasks = (Task(job, self._seed(job.params), {**options, "priority": job.priority}) for job in jobs)
        window = sum(engine.most for engine in self._engines)
        source = ReadySource(tasks) if ready else WaitingSource(tasks, window)
        #: what has to be done again, the first of the call first
        again: list[Task] = []
        try:
            while True:
                self._give(source, again)
                busy = any(engine.tasks for engine in self._engines)
                if not busy and not again and source.exhausted:
                    return
                refs = [ref for engine in self._engines for ref in engine.refs]
                if not refs:
                    raise RuntimeError(f"no engine is left: {self._engines[0].failure}")
                ray.wait(refs, timeout=_LOOK)
                finished, _ = ray.wait(refs, num_returns=len(refs), timeout=0)
                for engine in self._engines:
                    for task, output in engine.take(finished, again):
                        self._num_requests += 1
                        output.request_id, output.index = str(self._num_requests), task.job.index
                        source.finished()
                        yield output
                progress.tick()
        finally:
            source.close()
            for engine in self._engines:
                engine.cancel()

    def _seed(self, params: Any) -> int:
        """The seed of the next request, if it has none of its own: what one engine would give it, since which engine
        answers it shall make no difference.
        """
        self._num_unseeded += getattr(params, "seed", None) is None
        return seed_of(self._engine_seed, self._num_unseeded)

    def _give(self, source: ReadySource[Task] | WaitingSource[Task], again: list[Task]) -> None:
        """Give tasks to the engines that have room for them, the least busy one first."""
        engines = [engine for engine in self._engines if engine.is_up]
        while again and engines:
            takers = [engine for engine in engines if engine.takes(again[0])]
            if not takers:
                # it wants an engine of its own, which one of them becomes when it has done what it has
                engines.remove(min(engines, key=PooledEngine.load))
                break
            min(takers, key=PooledEngine.load).give(heapq.heappop(again))
        while not source.exhausted:
            takers = [engine for engine in engines if engine.takes(None)]
            if not takers:
                return
            idle = not again and not any(engine.tasks for engine in self._engines)
            taken = source.take(1, wait=idle)
            if not taken:
                return
            min(takers, key=PooledEngine.load).give(taken[0])

    def shutdown(self) -> None:
        """End the engines' processes, and the connection to the cluster where pools have made it, or the cluster where
        they have started it, with the last of them. Idempotent.
        """
        engines, self._engines = self._engines, []
        for engine in engines:
            engine.end()
        EnginePool._alive.discard(self)
        if EnginePool._connected and not EnginePool._alive:
            EnginePool._connected = False
            import_ray().shutdown()

    def __enter__(self) -> EnginePool:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()


def _create(remote_args: dict[str, Any], variables: dict[str, str]) -> Any:
    """A new actor, which has started no engine."""
    from jaxllm.ray.actor import EngineActor

    return import_ray().remote(**{"max_concurrency": _MOST_CALLS, **remote_args})(EngineActor).remote(variables)
