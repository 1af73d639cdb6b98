"""Beam search on top of the engine: every step of every beam is a request for one token."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from typing import Any

from jaxllm.api import checks
from jaxllm.api.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import PositionLogprobs
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.engine.io.prompts import PreparedPrompt, Prompt
from jaxllm.engine.observe.progress import bar_class
from jaxllm.methods.base import EngineMethods, refuse
from jaxllm.methods.prompts import as_prompts


class _Search:
    """The beams of one prompt."""

    def __init__(self, prompt: PreparedPrompt):
        self.cache_salt = prompt.cache_salt
        self.beams = [BeamSearchSequence(tokens=list(prompt.token_ids))]
        self.completed: list[BeamSearchSequence] = []
        #: one of its requests has been ended from outside
        self.is_aborted = False

    def extend(self, logprobs: Sequence[PositionLogprobs], params: BeamSearchParams, eos: frozenset[int]) -> None:
        """Replace the beams by the best of their continuations.

        Args:
            logprobs: of the next token of each beam, the 2 * beam_width most likely ones at least: were half of them
                ends of sequence, there would still be enough to go on with.
        """
        candidates: list[BeamSearchSequence] = []
        for beam, position in zip(self.beams, logprobs, strict=True):
            for token, entry in position.items():
                ends = token in eos and not params.ignore_eos
                extended = BeamSearchSequence(
                    tokens=beam.tokens if ends and not params.include_stop_str_in_output else [*beam.tokens, token],
                    logprobs=[*beam.logprobs, position],
                    cum_logprob=beam.cum_logprob + entry.logprob,
                    finish_reason="stop" if ends else None,
                    stop_reason=token if ends else None,
                )
                (self.completed if ends else candidates).append(extended)
        self.beams = _best(candidates, params)

    def sequences(self, params: BeamSearchParams) -> list[BeamSearchSequence]:
        for beam in self.beams:
            beam.finish_reason = "abort" if self.is_aborted else "length"
        return _best([*self.completed, *self.beams], params)


def _best(sequences: list[BeamSearchSequence], params: BeamSearchParams) -> list[BeamSearchSequence]:
    ranked = sorted(sequences, key=lambda sequence: sequence.score(params.length_penalty), reverse=True)
    return ranked[: params.beam_width]


class BeamSearchMethods(EngineMethods):
    """beam_search."""

    def beam_search(
        self,
        prompts: Prompt | Iterable[Prompt],
        params: BeamSearchParams,
        lora_request: None = None,
        use_tqdm: bool = False,
        concurrency_limit: int | None = None,
        priority: int | None = None,
    ) -> list[BeamSearchOutput]:
        """The likeliest sequences of each prompt.

        A prompt one of whose requests is aborted ends there: its sequences are what there is, with
        ``finish_reason="abort"``, and the other prompts go on.

        A step asks for the 2 * beam_width most likely next tokens of every beam; the prefix cache has what beams share.

        Args:
            prompts: as in `generate`.
            concurrency_limit: prompts searched at the same time; None: all.

        Raises:
            ValidationError: a prompt is refused, or ``2 * beam_width`` is more than the engine's ``max_logprobs``.
            RuntimeError: the engine failed or was shut down by another call.
        """
        self._require_generation("beam_search")
        refuse(lora_request=lora_request)
        if not isinstance(params, BeamSearchParams):
            raise TypeError(f"params must be BeamSearchParams, got {type(params).__name__}")
        if concurrency_limit is not None and checks.integer("concurrency_limit", concurrency_limit) < 1:
            raise ValidationError(f"concurrency_limit must be at least 1, got {concurrency_limit}.")
        read = self._inputs.reader.read(list(as_prompts(prompts)))
        searches: list[_Search] = []
        for prompt in read:
            if isinstance(prompt, ValidationError):
                raise prompt
            searches.append(_Search(prompt))
        limit = concurrency_limit or max(len(searches), 1)
        total = -(-len(searches) // limit) * params.max_tokens
        with bar_class()(total=total, desc="Beam search", unit="token", disable=not use_tqdm) as bar:
            for first in range(0, len(searches), limit):
                self._search(searches[first : first + limit], params, priority, bar)
        outputs = [BeamSearchOutput(sequences=search.sequences(params)) for search in searches]
        if self._tokenizer is not None:
            for sequence in (sequence for output in outputs for sequence in output.sequences):
                sequence.text = str(
                    self._tokenizer.decode(sequence.tokens, skip_special_tokens=params.skip_special_tokens)
                )
        return outputs

    def _search(self, searches: list[_Search], params: BeamSearchParams, priority: int | None, bar: Any) -> None:
        one_token = SamplingParams(
            max_tokens=1, temperature=params.temperature, logprobs=2 * params.beam_width, detokenize=False
        )
        eos = self._inputs.eos_token_ids
        room = self._client.core.scheduler.config.max_model_len
        for _ in range(params.max_tokens):
            live = [s for s in searches if s.beams and not s.is_aborted and len(s.beams[0].tokens) < room]
            prompts = [_prompt(beam, search) for search in live for beam in search.beams]
            if not prompts:
                break
            found = self._feed(prompts, one_token, priority=priority).outputs()
            positions = [output.outputs[0].logprobs for output in sorted(found, key=lambda output: output.index)]
            of_all_beams = iter(positions)
            for search in live:
                of_beams = list(itertools.islice(of_all_beams, len(search.beams)))
                search.is_aborted = not all(of_beams)
                if not search.is_aborted:
                    search.extend([position for (position,) in of_beams], params, eos)
            bar.update()


def _prompt(beam: BeamSearchSequence, search: _Search) -> Prompt:
    salt = {} if search.cache_salt is None else {"cache_salt": search.cache_salt}
    return {"prompt_token_ids": beam.tokens, **salt}
