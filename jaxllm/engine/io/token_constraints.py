"""What restricts single requests' next tokens: grammars that compile beside the engine, thinking budgets, and traces.

The masks of a step follow from its requests' earlier tokens. So for a step with such requests the engine launches
the forward program, reads their earlier steps while it runs, and launches the sampler with the masks. A launch with
drafts is one program: it is made when all of that is read, with drafts of the host for these requests.
"""

from __future__ import annotations

import concurrent.futures
from typing import TYPE_CHECKING

import numpy as np

from jaxllm.api.constraints import StructuredOutputsParams
from jaxllm.api.errors import ValidationError
from jaxllm.structured.drafts import CheckedDrafts, HostDraftRule, HostDrafts, masks_of
from jaxllm.structured.thinking import ReasoningMarks, ThinkingMatcher, reasoning_marks
from jaxllm.structured.trace import TraceMatcher

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from jaxllm.api.sampling_params import SamplingParams
    from jaxllm.config.structured_outputs import ReasoningConfig, StructuredOutputsConfig
    from jaxllm.engine.request import Request
    from jaxllm.engine.scheduling.step_updates import StepUpdates
    from jaxllm.engine.step import SchedulerOutput
    from jaxllm.structured.compiler import GrammarCompiler
    from jaxllm.structured.matcher import Matcher

#: masks that are worth the threads; one takes about 20 us (measured, vocabularies of 49k and 151k)
FILLED_TOGETHER = 64
#: seconds that a wait for a grammar may take before Ctrl-C is looked for
PATIENCE = 0.05


class TokenConstraints:
    """The matchers of one engine's requests.

    Args:
        compiler: None: there cannot be grammars.
        obstacle: why not, for the user.
        vocab_size: tokens of the model.
        lockstep: wait for a grammar when its request comes (`SchedulerConfig.lockstep`).
        draft_rule: how the host drafts for restricted requests; None: nobody does.
    """

    def __init__(
        self,
        compiler: GrammarCompiler | None,
        tokenizer: PreTrainedTokenizerBase | None,
        *,
        obstacle: str,
        vocab_size: int,
        config: StructuredOutputsConfig,
        reasoning: ReasoningConfig,
        lockstep: bool = False,
        draft_rule: HostDraftRule | None = None,
    ):
        self._compiler, self._obstacle = compiler, obstacle
        self._tokenizer = tokenizer
        self._config = config
        self._reasoning, self._lockstep, self._draft_rule = reasoning, lockstep, draft_rule
        self._marks: ReasoningMarks | None = None
        self._num_words = -(-vocab_size // 32)
        #: requests whose grammar is being compiled
        self._waiting: dict[str, Request] = {}
        #: whether any request has ever been restricted: else no step needs looking at
        self.used = False

    def check(self, params: SamplingParams) -> None:
        """Refuse what cannot be honoured, as far as that is quickly found. Raises ValidationError."""
        if params.thinking_token_budget is not None:
            self._reasoning_marks()
        if isinstance(params.structured_outputs, StructuredOutputsParams):
            if self._compiler is None:
                raise ValidationError(self._obstacle)
            self._compiler.check(params.structured_outputs)

    def add(self, request: Request) -> None:
        """Take a request that `check` has passed; its grammar is compiled from now on."""
        structured = request.params.structured_outputs
        if isinstance(structured, StructuredOutputsParams) and self._compiler is not None:
            self.used = True
            request.grammar = self._compiler.compile(structured)
            self._waiting[request.request_id] = request
            self._settle(request)
        elif request.params.trace_decode_token_ids is not None:
            self.used = True
            self._follow(request, TraceMatcher(request.params.trace_decode_token_ids))
        elif request.params.thinking_token_budget is not None:
            self.used = True
            self._follow(request, self._thinking(request))

    def _follow(self, request: Request, matcher: Matcher) -> None:
        request.matcher = matcher
        if self._draft_rule is not None:
            request.host_drafts = HostDrafts(
                self._draft_rule,
                first=0 if request.prompt_embeds is None else request.num_prompt_tokens,
                ends_when_complete=_ends_when_complete(request),
            )

    def _settle(self, request: Request) -> bool:
        """Give a request its compiled grammar; returns whether it has ended waiting, with `error` set if in vain."""
        future = request.grammar
        if request.is_finished or future is None:
            del self._waiting[request.request_id]
            return True
        if not (self._lockstep or future.done()):
            return False
        del self._waiting[request.request_id]
        try:
            matcher: Matcher = future.result().matcher()
        except Exception as error:  # whatever it is, it is this grammar's
            request.error = str(error) if isinstance(error, ValidationError) else f"Grammar error: {error}"
            return True
        request.grammar = None
        reasons = self._reasoning.is_set and not self._config.enable_in_reasoning
        if reasons or request.params.thinking_token_budget is not None:
            matcher = self._thinking(request, matcher)
        self._follow(request, matcher)
        return True

    def _reasoning_marks(self) -> ReasoningMarks:
        if self._marks is None:
            self._marks = reasoning_marks(self._tokenizer, self._reasoning)
        return self._marks

    def _thinking(self, request: Request, grammar: Matcher | None = None) -> ThinkingMatcher:
        budget = request.params.thinking_token_budget
        return ThinkingMatcher(self._reasoning_marks(), budget, request.prompt_token_ids, grammar)

    def failed(self) -> list[Request]:
        """Requests whose grammar turned out wrong since the last call; what is compiled by now can be scheduled."""
        if not self._waiting:
            return []
        return [r for r in list(self._waiting.values()) if self._settle(r) and r.error and not r.is_finished]

    def wait(self) -> None:
        """Wait a little for a grammar, if any is being compiled: nothing else is left to do."""
        futures = [request.grammar for request in self._waiting.values() if request.grammar is not None]
        if futures:
            concurrent.futures.wait(futures, PATIENCE, concurrent.futures.FIRST_COMPLETED)

    def masked_rows(self, scheduled: SchedulerOutput) -> frozenset[int]:
        """Rows of a step that sample under a mask."""
        if not self.used:
            return frozenset()
        return frozenset(
            row
            for row, request, wanted in zip(scheduled.rows, scheduled.requests, scheduled.wanted, strict=True)
            # this step's own token is among the placeholders; without any, positions of the prompt are scored
            if wanted
            and request.num_output_placeholders
            and request.matcher is not None
            and request.matcher.may_constrain(request.num_output_placeholders - 1)
        )

    def masks(self, scheduled: SchedulerOutput) -> tuple[dict[int, np.ndarray], list[Request]]:
        """The masks of a step, now that everything before it is read; and the requests that cannot go on."""
        masks: dict[int, np.ndarray] = {}
        lost = []
        masked = [
            (row, request)
            for row, request in zip(scheduled.rows, scheduled.requests, strict=True)
            if row in scheduled.masked_rows and not request.is_finished
        ]
        grammars = [request.matcher.grammar for _, request in masked]
        grammars = [grammar for grammar in grammars if grammar is not None]
        if len(grammars) >= FILLED_TOGETHER and self._compiler is not None:
            self._compiler.fill_together(grammars)
        for row, request in masked:
            mask = np.full(self._num_words, -1, np.int32)
            request.error = request.matcher.fill_mask(mask)
            if request.error is not None:
                lost.append(request)
            else:
                masks[row] = mask
        return masks, lost

    def drafts(self, scheduled: SchedulerOutput) -> tuple[dict[int, CheckedDrafts], list[Request]]:
        """`masks` for a launch with drafts, of each position, and the drafts."""
        checked: dict[int, CheckedDrafts] = {}
        lost = []
        for row, request in zip(scheduled.rows, scheduled.requests, strict=True):
            matcher = request.matcher
            if row not in scheduled.masked_rows or request.is_finished or matcher is None:
                continue
            found = []
            if request.host_drafts is not None:
                found = request.host_drafts.find(request.all_token_ids, matcher)[: scheduled.num_drafts]
            checked[row], request.error = masks_of(found, matcher, self._num_words)
            if request.error is not None:
                lost.append(request)
        return checked, lost

    def advance(self, updates: StepUpdates) -> tuple[list[Request], list[Request]]:
        """Take new tokens; returns the requests that must not have got theirs, and those that have nothing to add."""
        lost, complete = [], []
        for request, count in zip(updates.requests, updates.counts, strict=True):
            matcher = request.matcher
            if matcher is None:
                continue
            if request.is_finished:
                request.matcher = None
                continue
            for token_id in request.all_token_ids[-count:] if count else ():
                request.error = request.error or matcher.advance(token_id)
            if request.error is not None:
                lost.append(request)
            elif matcher.is_complete and _ends_when_complete(request):
                complete.append(request)
        return lost, complete

    def shutdown(self) -> None:
        """Stop compiling; idempotent."""
        self._waiting.clear()
        if self._compiler is not None:
            self._compiler.shutdown()


def _ends_when_complete(request: Request) -> bool:
    """Whether the request ends where its matcher allows nothing more: no end token will say it."""
    return request.params.ignore_eos or not request.eos_token_ids
