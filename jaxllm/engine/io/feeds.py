"""Feeds for the calls of one engine."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sized
from typing import TYPE_CHECKING, Any

from jaxllm.engine.io.feed import Feed
from jaxllm.engine.io.prompts import TokenizationOptions

if TYPE_CHECKING:
    from jaxllm.api.pooling_params import PoolingParams
    from jaxllm.api.sampling_params import SamplingParams
    from jaxllm.engine.client import EngineClient
    from jaxllm.engine.io.input_processor import InputProcessor
    from jaxllm.engine.io.pooling_inputs import PoolingInputs
    from jaxllm.tokenization.pool import TokenizerPool


class Feeds:
    """Makes a `Feed` for each call.

    Args:
        inputs: makes the requests of calls that bring nothing of their own for that.
        default_params: of calls without parameters.
    """

    def __init__(
        self, client: EngineClient, inputs: InputProcessor, pool: TokenizerPool, default_params: SamplingParams
    ):
        self.client = client
        self._inputs, self._pool, self._default_params = inputs, pool, default_params

    def feed(
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
        """A feed for the prompts of one call; `kwargs` are those of `Feed`.

        Args:
            params: None: the model's own defaults.
            options: how texts become tokens; None: as `tokenization_kwargs` say.
            window: None: enough to keep the scheduler busy.
        """
        scheduler = self.client.core.config
        if window is None:
            window = max(2 * self.client.core.max_num_seqs, 256)
        # the scheduler sorts by priority only what it has
        if scheduler.policy == "priority" and isinstance(prompts, Sized):
            window = max(window, len(prompts))
        return Feed(
            self.client,
            self._inputs if inputs is None else inputs,
            self._pool,
            prompts,
            self._default_params if params is None else params,
            window=window,
            lockstep=scheduler.lockstep,
            options=options or TokenizationOptions.of(tokenization_kwargs, max_model_len=scheduler.max_model_len),
            **kwargs,
        )
