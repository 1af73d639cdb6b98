"""From sampled tokens to `RequestOutput`s."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from jaxllm.api.outputs import CompletionOutput, RequestOutput
from jaxllm.api.sampling_params import RequestOutputKind
from jaxllm.engine.io.detokenizer import Detokenizer
from jaxllm.engine.io.logprobs import RequestLogprobs, TokenTexts
from jaxllm.engine.request import Request, RequestStatus

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.engine.scheduling.scheduler import Scheduler
    from jaxllm.engine.scheduling.step_updates import StepUpdates
    from jaxllm.engine.step import LogprobArrays, SchedulerOutput, StepOutput

_PREEMPTED = int(RequestStatus.PREEMPTED)
#: looking up an enum's member costs as much as the rest of a quiet token
_FINAL_ONLY = RequestOutputKind.FINAL_ONLY


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
            before = request.prompt_token_ids if request.prompt_embeds is None else []
            self.detokenizer = Detokenizer(backend, before, request.params)
        #: every token has to be looked at when it comes; else text is made when it is delivered
        self.finds_stops = self.detokenizer is not None and bool(request.params.stop)
        self.logprobs = RequestLogprobs(
            request.params, request.prompt_token_ids, texts if request.params.detokenize else None
        )
        self._prompt_logprobs_delivered = False
        self._delivered_tokens = self._decoded_tokens = 0

    def append(self, token_id: int, arrays: LogprobArrays | None, index: int, behind: int) -> str | None:
        """Take one token; returns the stop string that it completes.

        Args:
            behind: of the tokens that came with it, those that follow.
        """
        if arrays is not None:
            tokens = self.request.all_token_ids
            self.logprobs.append(arrays, index, tokens[:-behind] if behind else tokens)
        if self.detokenizer is None or not self.finds_stops or self._ends_with(token_id):
            return None
        return self.detokenizer.append(token_id)

    def _ends_with(self, token_id: int) -> bool:
        """Whether it is an end token, and so no part of the text."""
        request = self.request
        stopped = request.finish_reason == "stop" and token_id in request.stop_token_ids
        return stopped and not request.params.include_stop_str_in_output

    def _decode(self, detokenizer: Detokenizer, tokens: list[int]) -> None:
        """Make the text of what has come since the last time."""
        new = tokens[self._decoded_tokens :]
        self._decoded_tokens = len(tokens)
        if new and self._ends_with(new[-1]):
            new.pop()
        detokenizer.extend(new, last=self.request.is_finished)

    def output(self) -> RequestOutput | None:
        """What to deliver now; None when there is nothing new of the kind that was asked for."""
        request = self.request
        finished = request.is_finished
        if self.kind is _FINAL_ONLY and not finished:
            return None
        delivered = self._delivered_tokens
        if not finished and delivered and request.num_output_tokens - delivered < self._interval:
            return None
        tokens, logprobs, prompt_logprobs = request.output_token_ids, self.logprobs.sample, self.logprobs.prompt
        self._delivered_tokens = len(tokens)
        if self.detokenizer is not None and not self.finds_stops:
            self._decode(self.detokenizer, tokens)
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
            lora_request=request.lora_request,
        )
        return RequestOutput(
            request_id=request.request_id,
            prompt=self.text,
            prompt_token_ids=request.prompt_token_ids,
            outputs=[completion],
            finished=finished,
            prompt_logprobs=prompt_logprobs,
            metrics=self.request.metrics(self.created),
            num_cached_tokens=max(request.num_cached_tokens, 0),
            error=request.error,
            lora_request=request.lora_request,
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
        #: requests with stop strings, and those with outputs before the last one
        self._num_stops = self._num_streaming = 0

    def add(self, request: Request, text: str | None) -> None:
        state = OutputState(request, text, self._tokenizer, self._texts, self._stream_interval)
        self._states[request.request_id] = state
        self._num_stops += state.finds_stops
        self._num_streaming += state.kind is not _FINAL_ONLY

    def end(self, request: Request) -> RequestOutput | None:
        """The last output of a request that has ended."""
        state = self._states.pop(request.request_id, None)
        if state is None:
            return None
        self._forget(state)
        return state.output()

    def _forget(self, state: OutputState) -> None:
        self._num_stops -= state.finds_stops
        self._num_streaming -= state.kind is not _FINAL_ONLY

    def clear(self) -> None:
        self._states.clear()
        self._num_stops = self._num_streaming = 0

    def process(
        self, scheduled: SchedulerOutput, output: StepOutput, updates: StepUpdates, scheduler: Scheduler
    ) -> list[RequestOutput]:
        """Outputs of a step; ends requests whose stop string has come."""
        states, logprobs = self._states, output.logprobs
        self._take_prompt_logprobs(scheduled, output)
        if logprobs is None and not self._num_stops and not self._num_streaming:
            # nobody else is told anything
            last_outputs = [self.end(request) for request in updates.ended]
            return [result for result in last_outputs if result is not None]
        outputs = []
        entries = zip(updates.requests, tuple(updates.counts), updates.firsts, strict=True)
        for entry, (request, count, first) in enumerate(entries):
            state = states.get(request.request_id)
            if state is None:
                continue
            if logprobs is not None or state.finds_stops:
                for place, token_id in enumerate(request.all_token_ids[-count:] if count else ()):
                    behind = count - place - 1
                    stop = state.append(token_id, logprobs, first + place, behind)
                    if stop is not None:
                        # what came behind it was never generated, for the caller and for the metrics
                        del request.all_token_ids[len(request.all_token_ids) - behind :]
                        updates.counts[entry] -= behind
                        if request.is_finished:
                            # the token that fills the length may also complete a stop string, which says more
                            request.status, request.stop_reason = RequestStatus.FINISHED_STOPPED, stop
                        elif scheduler.finish(request, RequestStatus.FINISHED_STOPPED, stop):
                            updates.ended.append(request)
                        break
            finished = request.status > _PREEMPTED
            if not finished and state.kind is _FINAL_ONLY:
                continue
            result = state.output()
            if finished:
                del states[request.request_id]
                self._forget(state)
            if result is not None:
                outputs.append(result)
        return outputs

    def _take_prompt_logprobs(self, scheduled: SchedulerOutput, output: StepOutput) -> None:
        """Take what a step found about prompts, of the requests that still live."""
        arrays, index = output.prompt_logprobs, 0
        if arrays is None:
            return
        entries = zip(
            scheduled.requests, scheduled.starts, scheduled.counts, scheduled.wanted, output.scored_counts, strict=True
        )
        for request, start, count, wanted, scored in entries:
            if scored and (state := self._states.get(request.request_id)) is not None and state.request is request:
                state.logprobs.take_prompt(arrays, index, start + count - wanted, scored)
            index += scored
