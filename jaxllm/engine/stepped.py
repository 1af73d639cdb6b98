"""Requests whose outputs wait until they are asked for, of programs that drive the engine themselves."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jaxllm.api.lora_request import LoRARequest
    from jaxllm.api.outputs import RequestOutput
    from jaxllm.api.sampling_params import SamplingParams
    from jaxllm.engine.client import EngineClient
    from jaxllm.engine.io.input_processor import InputProcessor
    from jaxllm.engine.io.prompts import Prompt


class SteppedRequests:
    """The requests of `LLMEngine`. They belong to the engine: the steps of other calls deliver into them, too."""

    def __init__(self, client: EngineClient, inputs: InputProcessor):
        self._client, self._inputs = client, inputs
        self._outputs: list[RequestOutput] = []
        #: names of the requests of which more will come
        self._unfinished: set[str] = set()

    def add(
        self,
        name: str,
        prompt: Prompt,
        params: SamplingParams,
        priority: int,
        lora_request: LoRARequest | None = None,
    ) -> None:
        """Queue a request. Raises what `LLMEngine.add_request` does."""
        if not isinstance(name, str):
            raise TypeError(f"request_id must be a string, got {type(name).__name__}")
        if self._client.agreement is not None:
            self._client.agreement.check_request(name, prompt, params)
        request, text = self._inputs.request(self._client.next_id(name), prompt, params, priority, lora_request)
        with self._client.lock:
            self._client.add(request, text, self._receive, name)
            self._unfinished.add(name)

    def _receive(self, output: RequestOutput) -> None:
        if output.finished:
            self._unfinished.discard(output.request_id)
        self._outputs.append(output)

    def step(self) -> list[RequestOutput]:
        """What there is; where there is nothing, what one step of the engine brings."""
        if not self._outputs:
            self._client.step()
        outputs, self._outputs = self._outputs, []
        return outputs

    def abort(self, names: Iterable[str]) -> None:
        """End requests, whoever's: nothing more comes of those that are here, and others' callers get what there is."""
        names, client = list(names), self._client
        with client.lock:
            ended = [client.id_of(name) for name in names if name in self._unfinished]
            others = [client.id_of(name) for name in names if name not in self._unfinished]
            client.end(ended)
            self._unfinished.difference_update(names)
            self._outputs = [output for output in self._outputs if output.request_id not in names]
            client.abort(others)

    @property
    def num_unfinished(self) -> int:
        return len(self._unfinished)

    @property
    def is_done(self) -> bool:
        """Whether nothing comes any more, and nothing waits."""
        return not (self._unfinished or self._outputs)
