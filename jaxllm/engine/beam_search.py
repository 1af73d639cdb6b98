"""Beam search on top of the engine: every step of every beam is a request for one token."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jaxllm.api.beam_search import BeamSearchOutput, BeamSearchParams, BeamSearchSequence
from jaxllm.api.errors import ValidationError
from jaxllm.api.outputs import PositionLogprobs
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.engine.observe.progress import bar_class

if TYPE_CHECKING:
    from jaxllm.engine.io.feeds import Feeds
    from jaxllm.engine.io.input_processor import InputProcessor
    from jaxllm.engine.io.prompts import PreparedPrompt, Prompt


class _Search:
    """The beams of one prompt."""

    def __init__(self, prompt: PreparedPrompt):
        self.cache_salt = prompt.cache_salt
        self.beams = [BeamSearchSequence(tokens=list(prompt.token_ids))]
        self.completed: list[BeamSearchSequence] = []
        #: it, or one of its requests, has been ended from outside
        self.is_aborted = False

    def abort(self) -> None:
        """End the search after its step that runs; any thread may call it."""
        self.is_aborted = True

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


def beam_search(
    feeds: Feeds,
    inputs: InputProcessor,
    prompts: Sequence[Prompt],
    params: BeamSearchParams,
    *,
    request_ids: Sequence[str] | None = None,
    priority: int | None = None,
    lora_request: Any = None,
    concurrency_limit: int | None = None,
    use_tqdm: bool = False,
) -> list[BeamSearchOutput]:
    """The likeliest sequences of each prompt; `LLM.beam_search` says more."""
    searches: list[_Search] = []
    for index, prompt in enumerate(inputs.reader.read(prompts)):
        if isinstance(prompt, ValidationError):
            raise prompt if len(prompts) == 1 else ValidationError(f"prompts[{index}]: {prompt}")
        if prompt.embeds is not None:
            raise ValidationError("beam_search takes no prompt_embeds: its beams are lists of token ids.")
        if prompt.media is not None:
            raise ValidationError("beam_search takes no images: its beams are lists of token ids. Use generate().")
        searches.append(_Search(prompt))
    limit = concurrency_limit or max(len(searches), 1)
    total = -(-len(searches) // limit) * params.max_tokens
    aborts = dict(zip(request_ids or (), (search.abort for search in searches), strict=False))
    with (
        feeds.client.abortable(aborts),
        bar_class()(total=total, desc="Beam search", unit="token", disable=not use_tqdm) as bar,
    ):
        for first in range(0, len(searches), limit):
            _advance(feeds, searches[first : first + limit], params, inputs.eos_token_ids, priority, lora_request, bar)
    outputs = [BeamSearchOutput(sequences=search.sequences(params)) for search in searches]
    if inputs.tokenizer is not None:
        for sequence in (sequence for output in outputs for sequence in output.sequences):
            sequence.text = str(
                inputs.tokenizer.decode(sequence.tokens, skip_special_tokens=params.skip_special_tokens)
            )
    return outputs


def _advance(
    feeds: Feeds,
    searches: list[_Search],
    params: BeamSearchParams,
    eos: frozenset[int],
    priority: int | None,
    lora_request: Any,
    bar: Any,
) -> None:
    """Run searches to their end, together."""
    one_token = SamplingParams(
        max_tokens=1, temperature=params.temperature, logprobs=2 * params.beam_width, detokenize=False
    )
    room = feeds.client.core.config.max_model_len
    for _ in range(params.max_tokens):
        live = [s for s in searches if s.beams and not s.is_aborted and len(s.beams[0].tokens) < room]
        prompts = [_prompt(beam, search) for search in live for beam in search.beams]
        if not prompts:
            break
        found = feeds.feed(prompts, one_token, priority=priority, lora_request=lora_request).outputs()
        positions = [output.outputs[0].logprobs for output in sorted(found, key=lambda output: output.index)]
        of_all_beams = iter(positions)
        for search in live:
            of_beams = list(itertools.islice(of_all_beams, len(search.beams)))
            if not all(of_beams):
                search.abort()
            if not search.is_aborted:
                search.extend([position for (position,) in of_beams], params, eos)
        bar.update()


def _prompt(beam: BeamSearchSequence, search: _Search) -> Prompt:
    salt = {} if search.cache_salt is None else {"cache_salt": search.cache_salt}
    return {"prompt_token_ids": beam.tokens, **salt}
