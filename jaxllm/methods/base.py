"""What every kind of method of an `LLM` may use."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.engine.io.feed import Feed
from jaxllm.engine.io.prompts import TokenizationOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.api.pooling_params import PoolingParams
    from jaxllm.api.sampling_params import SamplingParams
    from jaxllm.engine.client import EngineClient
    from jaxllm.engine.io.input_processor import InputProcessor
    from jaxllm.engine.io.pooling_inputs import PoolingInputs
    from jaxllm.runner.memory.plan import MemoryPlan
    from jaxllm.startup import Started
    from jaxllm.tokenization.pool import TokenizerPool


class EngineMethods:
    """A running engine. `LLM` is made of its subclasses, one for each kind of method."""

    _client: EngineClient
    _inputs: InputProcessor
    _pool: TokenizerPool
    _tokenizer: PreTrainedTokenizerBase | None
    _default_params: SamplingParams
    _started: Started
    #: what the device's memory holds, in bytes; prints as a table
    memory_plan: MemoryPlan

    def _require_generation(self, method: str) -> None:
        """Refuse a method that continues prompts on an engine that pools them."""
        if self._started.pooling_inputs is not None:
            raise ValidationError(
                f"LLM.{method}() is only supported for generative models. Try passing `--runner generate` to use the "
                "model as a generative model."
            )

    def _feed(
        self,
        prompts: Iterable[Any],
        params: SamplingParams | PoolingParams | Iterable[SamplingParams | PoolingParams] | None,
        *,
        inputs: InputProcessor | PoolingInputs | None = None,
        tokenization_kwargs: Mapping[str, Any] | None = None,
        options: TokenizationOptions | None = None,
        window: int | None = None,
        **kwargs: Any,
    ) -> Feed:
        """A `Feed` for prompts of one call."""
        scheduler = self._client.core.scheduler.config
        # the scheduler sorts by priority only what it has
        if window is None:
            window = max(2 * scheduler.max_num_seqs, 256)
        if scheduler.policy == "priority" and isinstance(prompts, Sized):
            window = max(window, len(prompts))
        return Feed(
            self._client,
            self._inputs if inputs is None else inputs,
            self._pool,
            prompts,
            self._default_params if params is None else params,
            window=window,
            options=options or TokenizationOptions.of(tokenization_kwargs, max_model_len=scheduler.max_model_len),
            **kwargs,
        )


def refuse(**arguments: Any) -> None:
    """Refuse what later capabilities will take."""
    for name, value in arguments.items():
        if value:
            raise ValidationError(f"{name} is not supported yet")
