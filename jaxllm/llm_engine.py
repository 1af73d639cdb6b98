"""`LLMEngine`: the engine one step at a time, for programs with a loop of their own."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any

from jaxllm.api.lora_request import LoRARequest
from jaxllm.api.method_arguments import with_params
from jaxllm.api.outputs import RequestOutput
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.api.tracebacks import short_tracebacks
from jaxllm.config.engine_args import EngineArgs, refuse_stat_loggers, refuse_to_set
from jaxllm.engine.io.prompts import Prompt
from jaxllm.engine.observe.notebook import shown
from jaxllm.llm import LLM

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.api.metric import Metric
    from jaxllm.config.scheduler import SchedulerConfig
    from jaxllm.config.vllm_config import CacheConfig, ModelConfig, ParallelConfig, VllmConfig


@short_tracebacks
class LLMEngine:
    """Requests in by `add_request`, outputs out by `step`, as in vLLM's class of this name.

    The arguments are `LLM`'s, or an `LLM` that runs already, whose `LLMEngine`s share their requests. Outputs come as
    ``sampling_params.output_kind`` says: all text so far (the default), only what is new, or one output at the end.
    """

    def __init__(self, model: str | os.PathLike[str] | LLM, **kwargs: Any):
        if isinstance(model, LLM) and kwargs:
            raise TypeError(f"an engine that runs already takes no arguments: got {', '.join(kwargs)}")
        #: the engine's other methods
        self.llm = model if isinstance(model, LLM) else LLM(model, **kwargs)
        #: what both are faces of
        self.engine = self.llm.engine

    def __setattr__(self, name: str, value: Any) -> None:
        refuse_to_set(name, value)
        super().__setattr__(name, value)

    @classmethod
    def from_engine_args(cls, engine_args: EngineArgs, **other: Any) -> LLMEngine:
        """An engine from arguments that are checked already. What vLLM takes besides is ignored, but for
        `stat_loggers`, which are refused.
        """
        refuse_stat_loggers(other)
        return cls(**engine_args.given())

    @classmethod
    def from_vllm_config(cls, vllm_config: VllmConfig, **other: Any) -> LLMEngine:
        """An engine from what `EngineArgs.create_engine_config` made, otherwise as `from_engine_args`."""
        return cls.from_engine_args(vllm_config.engine_args, **other)

    def __repr__(self) -> str:
        return self.engine.describe("LLMEngine")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return shown(self, include, exclude)

    @with_params("params", SamplingParams)
    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        lora_request: LoRARequest | None = None,
        priority: int = 0,
    ) -> str:
        """Queue a request and return its id.

        Raises:
            TypeError: the id is no string.
            ValidationError: prompt or parameters are refused, or the id is in use.
        """
        engine = self.engine
        params = engine.default_params if params is None else params
        engine.stepped.add(request_id, prompt, params, priority, lora_request)
        return request_id

    def step(self) -> list[RequestOutput]:
        """Run one step of the engine; returns what it brought, which may be nothing."""
        return self.engine.stepped.step()

    def abort_request(self, request_ids: str | list[str]) -> None:
        """End requests, by what their outputs call them; unknown ones are passed over.

        Nothing comes any more of those that `add_request` has queued. Whoever waits for others (`LLM.generate`, or
        what `LLM.enqueue` has queued) gets what there is of them, with ``finish_reason="abort"``.
        """
        self.engine.stepped.abort([request_ids] if isinstance(request_ids, str) else request_ids)

    def has_unfinished_requests(self) -> bool:
        return not self.engine.stepped.is_done

    def get_num_unfinished_requests(self) -> int:
        return self.engine.stepped.num_unfinished

    # Adapters.

    def add_lora(self, lora_request: LoRARequest) -> bool:
        """Begin to read an adapter, which requests can name from here on; whether it was new.

        Raises:
            ValidationError: it cannot be loaded, or its number is another one's.
        """
        return self.engine.adapters.add(lora_request)

    def remove_lora(self, lora_id: int) -> bool:
        """Forget an adapter; whether it was known. Requests that run with it go on."""
        return self.engine.adapters.remove(lora_id)

    def list_loras(self) -> set[int]:
        """The numbers of the adapters that are known."""
        return self.engine.adapters.numbers()

    def pin_lora(self, lora_id: int) -> bool:
        """Keep an adapter in memory. Raises ValidationError where it is not known, or would leave others no room."""
        return self.engine.adapters.pin(lora_id)

    def reset_prefix_cache(self, reset_running_requests: bool = False, reset_connector: bool = False) -> bool:
        """As `LLM.reset_prefix_cache`."""
        return self.engine.reset_prefix_cache(
            reset_running_requests=reset_running_requests, reset_connector=reset_connector
        )

    def sleep(self, level: int = 1, mode: str = "abort") -> None:
        """As `LLM.sleep`."""
        self.engine.sleep(level, mode)

    def wake_up(self, tags: list[str] | None = None) -> bool:
        """As `LLM.wake_up`."""
        return self.engine.wake_up(tags)

    def get_tokenizer(self) -> PreTrainedTokenizerBase:
        return self.engine.get_tokenizer()

    @property
    def vllm_config(self) -> VllmConfig:
        """What the engine was started with and found out, under vLLM's names: `model_config`, `cache_config`,
        `scheduler_config` and `parallel_config`. It is there to be read.
        """
        return self.engine.vllm_config

    @property
    def model_config(self) -> ModelConfig:
        """Its part about the model: `hf_config`, `max_model_len`, `dtype`, ..."""
        return self.engine.vllm_config.model_config

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.engine.get_tokenizer()

    @property
    def model_executor(self) -> ModelExecutor:
        """vLLM's way to the weights; deleting it, as vLLM's scripts do to free the memory, shuts the engine down."""
        return ModelExecutor(self.llm)

    @model_executor.deleter
    def model_executor(self) -> None:
        self.shutdown()

    @property
    def engine_core(self) -> ModelExecutor:
        """The same: vLLM's scripts begin the way to the model with either name."""
        return self.model_executor

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[Any]:
        """As `LLM.collective_rpc`."""
        return self.llm.collective_rpc(method, timeout, args, kwargs)

    @property
    def cache_config(self) -> CacheConfig:
        return self.engine.vllm_config.cache_config

    @property
    def scheduler_config(self) -> SchedulerConfig:
        return self.engine.vllm_config.scheduler_config

    @property
    def parallel_config(self) -> ParallelConfig:
        return self.engine.vllm_config.parallel_config

    def is_sleeping(self) -> bool:
        return self.engine.core.is_sleeping

    def do_log_stats(self) -> None:
        """Nothing: the line is logged by itself, with ``disable_log_stats=False``."""

    def get_metrics(self) -> list[Metric]:
        """As `LLM.get_metrics`."""
        return self.engine.core.metrics()

    def shutdown(self) -> None:
        """Free everything on the device; idempotent."""
        self.engine.shutdown()


class ModelExecutor:
    """What scripts reach through vLLM's engine for, ``llm.llm_engine.model_executor.driver_worker.model_runner.model``:
    all of that is here this one object, since there are no workers.
    """

    #: names on the way from vLLM's engine to its model
    _WAY = ("engine_core", "model_executor", "driver_worker", "worker", "model_runner", "model")

    def __init__(self, llm: LLM):
        self._llm = llm
        #: what it is a face of
        self.engine = llm.engine

    def __repr__(self) -> str:
        return self.engine.describe("ModelExecutor")

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        return shown(self, include, exclude)

    def __getattr__(self, name: str) -> Any:
        if name in self._WAY:
            return self
        raise AttributeError(
            f"jaxllm has no {name!r} inside of its engine: LLM.apply_model shows the weights, LLM.update_weights "
            "replaces them, and load_weights does so here; llm.llm_engine.vllm_config tells of the engine"
        )

    def __delattr__(self, name: str) -> None:
        if name in self._WAY:
            # vLLM's scripts delete the worker to free the memory
            self.shutdown()
        else:
            super().__delattr__(name)

    def load_weights(self, weights: Mapping[str, Any] | Iterable[tuple[str, Any]]) -> set[str]:
        """Replace tensors by Hugging Face's names, which are returned (`LLM.update_weights`). They are in force when it
        returns, so nothing can be gathered over several calls: give all at once, as a dict or an iterator. Equal layers
        are stacked in one array, which each call that has a tensor of it makes anew: with one tensor a call, the time
        grows with the square of the number of layers.
        """
        tensors = dict(weights)
        self._llm.update_weights(tensors)
        return set(tensors)

    def save_sharded_state(
        self, path: str | os.PathLike[str], pattern: str | None = None, max_size: int | None = None
    ) -> None:
        """As `LLM.save`: each device reads its own part of any checkpoint, so that none has to be cut up for them.
        `pattern` and `max_size`, of vLLM's files of each worker, change nothing.
        """
        self._llm.save(path)

    def collective_rpc(self, *args: Any, **kwargs: Any) -> list[Any]:
        """As `LLM.collective_rpc`."""
        return self._llm.collective_rpc(*args, **kwargs)

    def shutdown(self) -> None:
        """As `LLM.shutdown`."""
        self._llm.shutdown()
