"""An engine in a process of Ray's."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput, failed_output
from jaxllm.api.sampling_params import RequestOutputKind, SamplingParams

if TYPE_CHECKING:
    from jaxllm.async_llm import AsyncLLM


def set_environment(variables: Mapping[str, str]) -> None:
    """Set variables of this process, which has not started JAX, where nobody has set them."""
    for name, value in variables.items():
        os.environ.setdefault(name, value)


async def answer(llm: AsyncLLM, prompt: Any, params: Any, seed: int, **options: Any) -> RequestOutput:
    """The finished output of a prompt; where it is refused, one that says why.

    Args:
        params: None: the model's own defaults.
        seed: of a request whose parameters have none. Engines that start alike would draw alike, too.
        options: those of `AsyncLLM.generate`.

    Raises:
        RuntimeError: the engine failed.
    """
    if params is None:
        params = llm.engine.default_params
    if isinstance(params, SamplingParams):
        params = params.clone()
        params.output_kind = RequestOutputKind.FINAL_ONLY
        params.seed = seed if params.seed is None else params.seed
    try:
        async for output in llm.generate(prompt, params, **options):
            if output.finished:
                return output
    except RuntimeError:
        raise
    except Exception as error:  # noqa: BLE001 - the request's own fault, of which others shall not suffer
        reason = str(error) if isinstance(error, (ValidationError, TypeError)) else repr(error)
        return failed_output("", prompt if isinstance(prompt, str) else None, reason)
    raise RuntimeError("the engine has ended a request without an output")


class EngineActor:
    """The class of the actors of a pool. Nothing is started by the constructor: what it raises, Ray would tell as the
    death of the actor.
    """

    def __init__(self, environment: Mapping[str, str]):
        set_environment(environment)

    async def start(self, arguments: dict[str, Any]) -> int:
        """Start the engine; returns how many requests it runs at once. Raises what `LLM` does."""
        from jaxllm.async_llm import AsyncLLM

        self._llm = await AsyncLLM.start(**arguments)
        return self._llm.engine.core.max_num_seqs

    async def answer(self, prompt: Any, params: Any, seed: int, options: dict[str, Any]) -> RequestOutput:
        """As the function of this name."""
        return await answer(self._llm, prompt, params, seed, **options)
