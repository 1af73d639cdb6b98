"""From sampled tokens to `RequestOutput`s."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from jaxllm.engine.detokenizer import Detokenizer
from jaxllm.engine.logprobs import RequestLogprobs, TokenTexts
from jaxllm.engine.request import Request, RequestStatus
from jaxllm.outputs import CompletionOutput, RequestMetrics, RequestOutput
from jaxllm.sampling_params import RequestOutputKind

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.engine.scheduler import RequestUpdate, Scheduler
    from jaxllm.runner.interface import LogprobArrays, SchedulerOutput, StepOutput


class OutputState:
    """What the caller has been, and will be, told of one request."""

    def __init__(
        self,
        request: Request,
        text: str | None,
        tokenizer: PreTrainedTokenizerBase | None,
        texts: TokenTexts | None,
        stream_interval: int = 1,
    ):
        self.request = request
        self.text = text
        self.created = time.time()
        self.kind = request.params.output_kind
        self._interval = max(request.params.stream_interval or 1, stream_interval)
        backend = getattr(tokenizer, "backend_tokenizer", None)
        self.detokenizer = None
        if request.params.detokenize and backend is not None:
            self.detokenizer = Detokenizer(backend, request.prompt_token_ids, request.params)
        self.logprobs = RequestLogprobs(
            request.params, request.prompt_token_ids, texts if request.params.detokenize else None
        )
        self._prompt_logprobs_delivered = False
        self._delivered_tokens = 0

    def append(self, token_id: int, arrays: LogprobArrays | None, index: int) -> str | None:
        """Take one token; returns the stop string that it completes."""
        if arrays is not None:
            self.logprobs.append(arrays, index, self.request.all_token_ids)
        if self.detokenizer is None:
            return None
        request = self.request
        stopped_by_token = request.finish_reason == "stop" and token_id in request.stop_token_ids
        if stopped_by_token and not request.params.include_stop_str_in_output:
            return None  # an end token is not part of the text
        return self.detokenizer.append(token_id, find_stop=request.num_output_tokens >= request.params.min_tokens)

    def output(self) -> RequestOutput | None:
        """What to deliver now; None when there is nothing new of the kind that was asked for."""
        request = self.request
        finished = request.is_finished
        if self.kind is RequestOutputKind.FINAL_ONLY and not finished:
            return None
        delivered = self._delivered_tokens
        if not finished and delivered and request.num_output_tokens - delivered < self._interval:
            return None
        tokens, logprobs, prompt_logprobs = request.output_token_ids, self.logprobs.sample, self.logprobs.prompt
        self._delivered_tokens = len(tokens)
        text = ""
        if self.kind is RequestOutputKind.DELTA:
            text = self.detokenizer.delta(finished) if self.detokenizer else ""
            new = slice(delivered, None)
            tokens, logprobs = tokens[new], logprobs[new] if logprobs is not None else None
            if prompt_logprobs is not None and self._prompt_logprobs_delivered:
                prompt_logprobs = []
            self._prompt_logprobs_delivered = True
        elif self.detokenizer is not None:
            text = self.detokenizer.visible(finished)
        completion = CompletionOutput(
            index=0,
            text=text,
            token_ids=tokens,
            cumulative_logprob=None if logprobs is None else self.logprobs.cumulative,
            logprobs=None if logprobs is None else logprobs[:],
            finish_reason=request.finish_reason,
            stop_reason=request.stop_reason,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.text,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[completion],
            finished=finished,
            prompt_logprobs=prompt_logprobs,
            metrics=self._metrics(),
            num_cached_tokens=max(request.num_cached_tokens, 0),
            error=request.error,
        )

    def _metrics(self) -> RequestMetrics:
        request = self.request
        first = request.first_token_ts
        return RequestMetrics(
            num_generation_tokens=request.num_output_tokens,
            arrival_time=self.created,
            queued_ts=request.queued_ts,
            scheduled_ts=request.scheduled_ts,
            first_token_ts=first,
            last_token_ts=request.last_token_ts,
            first_token_latency=first - request.arrival_time if first else 0.0,
            num_preemptions=request.num_preemptions,
        )


class OutputProcessor:
    """All requests' output states, and the stop strings that end requests from here."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase | None, stream_interval: int = 1):
        """
        Args:
            stream_interval: tokens between two outputs of a request, at least; the first and the last always come.
        """
        self._tokenizer = tokenizer
        self._texts = None if tokenizer is None else TokenTexts(tokenizer)
        self._stream_interval = stream_interval
        self._states: dict[str, OutputState] = {}

    def add(self, request: Request, text: str | None) -> None:
        self._states[request.request_id] = OutputState(
            request, text, self._tokenizer, self._texts, self._stream_interval
        )

    def end(self, request: Request) -> RequestOutput | None:
        """The last output of a request that was ended from outside."""
        state = self._states.pop(request.request_id, None)
        return None if state is None else state.output()

    def clear(self) -> None:
        self._states.clear()

    def take(self, scheduled: SchedulerOutput, output: StepOutput) -> None:
        """Take what a step found about prompts, of the requests that still live."""
        arrays, index = output.prompt_logprobs, 0
        if arrays is None:
            return
        for request, start, count in zip(scheduled.requests, scheduled.starts, scheduled.scored, strict=True):
            if count and (state := self._states.get(request.request_id)) is not None and state.request is request:
                state.logprobs.take_prompt(arrays, index, start, count)
            index += count

    def process(
        self, updates: list[RequestUpdate], logprobs: LogprobArrays | None, scheduler: Scheduler
    ) -> list[RequestOutput]:
        """Outputs of one step's updates; ends requests whose stop string has come."""
        outputs = []
        for request, token_ids, index, _ in updates:
            state = self._states.get(request.request_id)
            if state is None:
                continue
            for token_id in token_ids:
                stop = state.append(token_id, logprobs, index)
                if stop is not None:
                    if request.is_finished:
                        # the token that fills the length may also complete a stop string, which says more
                        request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, stop
                    else:
                        scheduler.finish(request, RequestStatus.FINISHED_STOPPED, stop)
            output = state.output()
            if request.is_finished:
                del self._states[request.request_id]
            if output is not None:
                outputs.append(output)
        return outputs
