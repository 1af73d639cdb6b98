"""One request's text while it is generated."""

from __future__ import annotations

import collections
from collections.abc import Generator
from typing import TYPE_CHECKING

from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import RequestOutput
from jaxllm.api.sampling_params import RequestOutputKind, SamplingParams
from jaxllm.api.tracebacks import ShortTracebacks
from jaxllm.engine.interrupt import DeferredInterrupt

if TYPE_CHECKING:
    from jaxllm.api.lora_request import LoRARequest
    from jaxllm.engine.client import EngineClient
    from jaxllm.engine.io.input_processor import InputProcessor
    from jaxllm.engine.io.prompts import Prompt


def stream_text(
    client: EngineClient,
    inputs: InputProcessor,
    prompt: Prompt,
    params: SamplingParams,
    lora_request: LoRARequest | None = None,
) -> Generator[str, None, None]:
    """Pieces of a completion; the engine works while the next one is asked for.

    Raises:
        ValidationError: prompt or parameters are refused, or ask for several completions.
    """
    if params.n > 1:
        raise ValidationError(f"a stream is one completion, and n={params.n}: use as_completed(), or AsyncLLM")
    params = params.clone()
    params.output_kind = RequestOutputKind.DELTA
    request, text = inputs.request(client.next_id(), prompt, params, lora_request=lora_request)

    def pieces() -> Generator[str, None, None]:
        outputs: collections.deque[RequestOutput] = collections.deque()
        with ShortTracebacks():
            client.add(request, text, outputs.append)
            try:
                finished = False
                while not finished:
                    with DeferredInterrupt(), client.lock:
                        # another thread's steps may have brought something while this one waited
                        if not outputs:
                            client.step()
                    while outputs:
                        output = outputs.popleft()
                        finished = output.finished
                        if output.error is not None and output.outputs[0].finish_reason == "error":
                            raise ValidationError(output.error)
                        if output.error is not None:
                            raise RuntimeError(f"the text is cut short: {output.error}")
                        if output.outputs[0].finish_reason == "abort":
                            raise RuntimeError("the text is cut short: the request was aborted")
                        if output.outputs[0].text:
                            yield output.outputs[0].text
            finally:
                client.end([request.request_id])

    return pieces()
