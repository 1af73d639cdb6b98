"""OpenAI's and vLLM's body parameters become `SamplingParams`. What is not honoured is refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from jaxllm.api.constraints import RepetitionDetectionParams, StructuredOutputsParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.entrypoints.openai.errors import APIError

#: the same in `SamplingParams`
SAMPLING = frozenset(
    (
        *("temperature", "top_p", "top_k", "min_p", "seed", "n"),
        *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
        *("stop", "stop_token_ids", "ignore_eos", "min_tokens", "include_stop_str_in_output"),
        *("skip_special_tokens", "spaces_between_special_tokens"),
        *("allowed_token_ids", "bad_words", "prompt_logprobs", "thinking_token_budget"),
    )
)
#: read here, by name
_SHAPED = frozenset(("response_format", "structured_outputs", "repetition_detection", "vllm_xargs"))
#: the caller's own notes, which no answer depends on
_LABELS = frozenset(("user", "metadata", "safety_identifier", "prompt_cache_key", "request_id", "store"))
#: parameter -> values that ask for nothing; others are refused. None always asks for nothing
_REFUSED: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "truncate_prompt_tokens": (),
    "mm_processor_kwargs": ({},),
    "kv_transfer_params": (),
    "logits_processors": (),
}
#: different sets of parameters that are remembered
_KEPT = 64
_WHY = {
    "stream": "a batch is not streamed",
}


def check_names(body: Mapping[str, Any], own: frozenset[str], refused: Mapping[str, tuple[Any, ...]]) -> None:
    """Refuse parameters that do not exist, and those that ask for what is not supported.

    Args:
        own: the endpoint's own parameters, besides those of all.
        refused: as `_REFUSED`, the endpoint's own.
    """
    refused = {**_REFUSED, **refused}
    known = SAMPLING | _SHAPED | _LABELS | own | refused.keys()
    for name, value in body.items():
        if name not in known:
            close = difflib.get_close_matches(name, sorted(known), n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise APIError(f"The parameter {name!r} does not exist.{hint}", param=name)
        if name in refused and value is not None and value not in refused[name]:
            why = _WHY.get(name, "it is not supported yet")
            raise APIError(f"{name}={value!r:.80} is refused: {why}.", param=name)


class SamplingReader:
    """Reads the sampling parameters of bodies; those not given are `defaults`, which come from the model.

    The lines of a batch mostly ask for the same, so what was read last is kept.
    """

    def __init__(self, defaults: SamplingParams):
        self._defaults = defaults
        self._known: dict[str, SamplingParams] = {}

    def read(self, body: Mapping[str, Any], *, max_tokens: Any, **own: Any) -> SamplingParams:
        """Return the body's parameters, which nobody must change.

        Args:
            max_tokens: as the endpoint understands it; None: until the context is full. As in vLLM, a `max_new_tokens`
                of the model's generation config limits it.
            own: what the endpoint reads in its own way.

        Raises APIError for a value that cannot be used.
        """
        given = {name: value for name, value in body.items() if name in SAMPLING and value is not None}
        given |= {"max_tokens": _limited(max_tokens, self._defaults), **own}
        shaped = {name: body[name] for name in _SHAPED if body.get(name) is not None}
        key = repr((given, shaped))
        if key not in self._known:
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = self._build(given, shaped)
        return self._known[key]

    def _build(self, given: dict[str, Any], shaped: dict[str, Any]) -> SamplingParams:
        try:
            given["structured_outputs"] = _structured_outputs(shaped)
            if "repetition_detection" in shaped:
                given["repetition_detection"] = RepetitionDetectionParams(**_mapping(shaped, "repetition_detection"))
            if "vllm_xargs" in shaped:
                given["extra_args"] = _mapping(shaped, "vllm_xargs")
            return dataclasses.replace(self._defaults, **given)
        except (ValidationError, TypeError) as error:
            raise APIError(str(error)) from error


def _limited(max_tokens: Any, defaults: SamplingParams) -> Any:
    limit = defaults.max_tokens
    # the model's config says nothing where `defaults` has the field's own default
    if limit is None or limit == SamplingParams().max_tokens:
        return max_tokens
    if max_tokens is None:
        return limit
    # anything else is for SamplingParams to refuse
    return min(max_tokens, limit) if isinstance(max_tokens, int) else max_tokens


def _structured_outputs(body: Mapping[str, Any]) -> StructuredOutputsParams | None:
    asked: list[dict[str, Any]] = []
    if body.get("structured_outputs") is not None:
        asked.append(_mapping(body, "structured_outputs"))
    if body.get("response_format") is not None:
        form = _mapping(body, "response_format")
        kind = form.get("type")
        if kind == "json_object":
            asked.append({"json_object": True})
        elif kind == "json_schema":
            schema = form.get("json_schema")
            if not isinstance(schema, Mapping) or not isinstance(schema.get("schema"), Mapping):
                raise APIError(
                    "response_format of type json_schema needs json_schema={'name': ..., 'schema': {...}}.",
                    param="response_format",
                )
            asked.append({"json": schema["schema"]})
        elif kind == "structural_tag":
            asked.append({"structural_tag": json.dumps(form)})
        elif kind != "text":
            raise APIError(
                f"response_format has type {kind!r}; it can be text, json_object, json_schema or structural_tag.",
                param="response_format",
            )
    if len(asked) > 1:
        raise APIError("Give response_format or structured_outputs, not both.", param="response_format")
    return StructuredOutputsParams(**asked[0]) if asked else None


def _mapping(body: Mapping[str, Any], name: str) -> dict[str, Any]:
    if not isinstance(body[name], Mapping):
        raise APIError(f"{name} must be an object, got {body[name]!r:.80}.", param=name)
    return dict(body[name])
