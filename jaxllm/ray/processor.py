"""Engines for `ray.data.Dataset`: rows with prompts in, rows with texts out, under the names of ``ray.data.llm``."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import secrets
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.argument_checks import at_least
from jaxllm.config.log import show_log
from jaxllm.ray.actor import answer, set_environment
from jaxllm.ray.cluster import environment, import_ray, machines, resources, worker_arguments

logger = logging.getLogger(__name__)

#: of a row that failed: why
ERROR_COLUMN = "__inference_error__"
#: what says how a row is done, and is no column of what comes out
_SAMPLING_PARAMS = "sampling_params"

Row = dict[str, Any]
RowFunction = Callable[[Row], Row]


@dataclasses.dataclass(frozen=True, kw_only=True)
class EngineProcessorConfig:
    """What `build_processor` makes: ``vLLMEngineProcessorConfig`` of ``ray.data.llm``, with what has a meaning here."""

    #: as for `LLM`; a path has to be there on every machine
    model_source: str | os.PathLike[str]
    #: `LLM`'s engine arguments
    engine_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    #: engines; or how many at least and at most
    concurrency: int | tuple[int, int] = 1
    #: rows that an engine is given at a time
    batch_size: int = 32
    #: batches that an engine works on at once, so that it is never empty between two of them
    max_concurrent_batches: int = 8
    #: a row that is refused gets its reason in a column ``__inference_error__`` and no postprocess, and ends no run
    should_continue_on_error: bool = False
    #: for each engine, as in `EnginePool`; None leaves a processor of each machine to the other stages
    num_cpus: float | None = None
    num_gpus: float | None = None
    accelerator_type: str | None = None
    runtime_env: Mapping[str, Any] | None = None
    #: without effect, as rows say it: conversations are rendered, prompts are not, and the engine tokenizes both
    apply_chat_template: bool = True
    tokenize: bool = True
    detokenize: bool = True

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_concurrent_batches"):
            at_least(1)(name, getattr(self, name))
        least, most = self.engines
        if not 1 <= least <= most:
            raise ValidationError(f"concurrency must be a number of engines or (least, most), got {self.concurrency!r}")
        if off := [n for n in ("apply_chat_template", "tokenize", "detokenize") if not getattr(self, n)]:
            logger.warning("%s=False has no effect: rows with messages are rendered, and texts come out.", off[0])

    @property
    def engines(self) -> tuple[int, int]:
        """The fewest and the most."""
        given = self.concurrency if isinstance(self.concurrency, (tuple, list)) else (self.concurrency,) * 2
        least, most = (at_least(1)("concurrency", number) for number in given)
        return least, most


def build_processor(
    config: EngineProcessorConfig, preprocess: RowFunction | None = None, postprocess: RowFunction | None = None
) -> Processor:
    """What turns a dataset into one with answers: ``build_processor(config, ...)(dataset)``, lazily, as Ray's own do.

    Args:
        preprocess: makes of a row what the engine needs: ``messages`` or ``prompt`` or ``tokenized_prompt``, and
            perhaps ``sampling_params``, a dict or `SamplingParams`. All columns of the row are kept beside that.
        postprocess: makes the row that comes out of one with all columns and the answer's: ``generated_text``,
            ``generated_tokens``, ``num_generated_tokens``, ``num_input_tokens``, ``finish_reason``,
            ``time_taken_llm`` (seconds).

    Raises:
        JaxLLMError: ray is not installed.
        TypeError, ValidationError: as of `LLM`, of the engine's arguments.
    """
    show_log()
    import_ray()
    return Processor(config, preprocess, postprocess)


class Processor:
    """A stage of a dataset; `build_processor` makes it."""

    def __init__(self, config: EngineProcessorConfig, preprocess: RowFunction | None, postprocess: RowFunction | None):
        self.config = config
        self._args, arguments = worker_arguments(config.model_source, dict(config.engine_kwargs))
        self._made_with = {
            "arguments": arguments,
            "preprocess": preprocess,
            "postprocess": postprocess,
            "should_continue_on_error": config.should_continue_on_error,
        }

    def __call__(self, dataset: Any) -> Any:
        """The dataset with answers. Raises ValidationError where the cluster has no room for the engines."""
        config, data = self.config, import_ray().data
        least, most = config.engines
        wanted = resources(machines(), self._args, least, config.num_cpus, config.num_gpus, spare_cpus=1)
        options = {"accelerator_type": config.accelerator_type, "runtime_env": config.runtime_env}
        return dataset.map_batches(
            BatchEngine,
            fn_constructor_kwargs={**self._made_with, "environment": environment(wanted)},
            batch_size=config.batch_size,
            batch_format="pyarrow",
            compute=data.ActorPoolStrategy(
                min_size=least,
                max_size=most,
                max_concurrent_calls_per_actor=config.max_concurrent_batches,
                max_tasks_in_flight_per_actor=config.max_concurrent_batches + 1,
            ),
            **wanted,
            **{name: value for name, value in options.items() if value is not None},
        )


class BatchEngine:
    """An engine as a class for ``dataset.map_batches(BatchEngine, batch_format="pyarrow", ...)``.

    Args:
        arguments: those of `LLM`.
        environment: variables of its process, such as ``{"JAX_PLATFORMS": "cpu"}``.
        preprocess, postprocess: as in `build_processor`.
        should_continue_on_error: as in `EngineProcessorConfig`.
    """

    def __init__(
        self,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
        preprocess: RowFunction | None = None,
        postprocess: RowFunction | None = None,
        should_continue_on_error: bool = False,
    ):
        set_environment(environment or {})
        from jaxllm.async_llm import AsyncLLM

        self._llm = AsyncLLM(**arguments)
        self._preprocess, self._postprocess = preprocess, postprocess
        self._continue = should_continue_on_error

    async def __call__(self, batch: Any) -> AsyncGenerator[dict[str, list[Any]], None]:
        """The rows of a table of Arrow, answered, as columns."""
        rows = await asyncio.gather(*map(self._answer, batch.to_pylist()))
        names = dict.fromkeys(name for row in rows for name in row)
        yield {name: [row.get(name) for row in rows] for name in names}

    async def _answer(self, row: Row) -> Row:
        began = time.perf_counter()
        if self._preprocess is not None:
            row = {**row, **self._preprocess(dict(row))}
        try:
            output = await answer(self._llm, prompt_of(row), params_of(row), secrets.randbits(64))
            reason = output.error
        except (ValidationError, TypeError) as error:
            output, reason = None, str(error)
        row.pop(_SAMPLING_PARAMS, None)
        if reason is not None or output is None:
            if not self._continue:
                raise ValidationError(f"the row {row!r:.200} is refused: {reason}")
            # postprocess would look for an answer
            return {**row, ERROR_COLUMN: reason}
        (completion,) = output.outputs
        row |= {
            "generated_text": completion.text,
            "generated_tokens": list(completion.token_ids),
            "num_generated_tokens": len(completion.token_ids),
            "num_input_tokens": len(output.prompt_token_ids),
            "finish_reason": completion.finish_reason,
            "time_taken_llm": time.perf_counter() - began,
        }
        if self._postprocess is not None:
            row = self._postprocess(row)
        return {**row, ERROR_COLUMN: ""} if self._continue else row


def prompt_of(row: Row) -> Any:
    """What a row asks. Raises ValidationError where it asks nothing."""
    # tables fill up what only some rows have
    given = {name: value for name, value in row.items() if value is not None}
    if "messages" in given:
        return {"messages": [{k: v for k, v in message.items() if v is not None} for message in given["messages"]]}
    if "tokenized_prompt" in given:
        return {"prompt_token_ids": list(given["tokenized_prompt"])}
    if "prompt" in given:
        return given["prompt"]
    raise ValidationError(
        f"a row needs 'messages', 'prompt' or 'tokenized_prompt', which preprocess can make; it has {', '.join(row)}"
    )


def params_of(row: Row) -> SamplingParams | None:
    """The sampling parameters of a row; None: the model's own defaults. Raises TypeError and ValidationError."""
    given = row.get(_SAMPLING_PARAMS)
    if isinstance(given, Mapping):
        given = SamplingParams(**{name: value for name, value in given.items() if value is not None})
    if given is not None and given.n != 1:
        raise ValidationError(f"n must be 1 in a row, which has room for one generated_text, got {given.n}")
    return given
