"""``n`` completions of one prompt: as many requests, one output."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

from jaxllm.api.outputs import CompletionOutput, RequestOutput
from jaxllm.api.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from jaxllm.engine.request import Request


class ParallelSampling:
    """The children of a request with ``n > 1``, and what becomes of their outputs.

    The first child computes the prompt, the others find it in the prefix cache (in the same step already). Child i
    samples with seed + i, so it gives what a request of its own with that seed gives.

    Args:
        receive: takes the outputs of the whole: one when all children have ended (``FINAL_ONLY``), otherwise one for
            each output of a child, with that child's completion alone.
    """

    def __init__(self, parent: Request, receive: Callable[[RequestOutput], object]):
        self._parent = parent
        self._receive = receive
        self._final_only = parent.params.output_kind is RequestOutputKind.FINAL_ONLY
        self._ended: dict[int, RequestOutput] = {}
        #: tokens of the longest completion that has ended
        self.longest = 0
        params = dataclasses.replace(parent.params, n=1)
        # the prompt is the same for all
        others = dataclasses.replace(params, prompt_logprobs=None)
        self.children = [
            parent.fork(f"{i}_{parent.request_id}", others if i else params, (parent.seed + i) % 2**64)
            for i in range(parent.params.n)
        ]

    def take(self, index: int, output: RequestOutput) -> None:
        """Take an output of child `index`."""
        output.request_id = self._parent.request_id
        output.outputs[0].index = index
        if output.finished:
            self._ended[index] = output
            self.longest = max(self.longest, output.metrics.num_generation_tokens)
        all_ended = len(self._ended) == len(self.children)
        if not self._final_only:
            output.finished = all_ended
            self._receive(output)
        elif all_ended:
            self._receive(self._together())

    def _together(self) -> RequestOutput:
        outputs = [self._ended[i] for i in range(len(self.children))]
        completions: list[CompletionOutput] = [output.outputs[0] for output in outputs]
        metrics = [output.metrics for output in outputs]
        return dataclasses.replace(
            outputs[0],
            outputs=completions,
            finished=True,
            error=next((output.error for output in outputs if output.error), None),
            metrics=dataclasses.replace(
                metrics[0],
                num_generation_tokens=sum(m.num_generation_tokens for m in metrics),
                first_token_ts=min(m.first_token_ts for m in metrics),
                last_token_ts=max(m.last_token_ts for m in metrics),
                first_token_latency=min(m.first_token_latency for m in metrics),
                num_preemptions=sum(m.num_preemptions for m in metrics),
            ),
        )
