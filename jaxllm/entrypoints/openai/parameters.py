"""OpenAI's and vLLM's body parameters, as `SamplingParams`. What is not honoured is refused by name."""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from jaxllm.entrypoints.openai.errors import APIError
from jaxllm.errors import ValidationError
from jaxllm.output_constraints import RepetitionDetectionParams, StructuredOutputsParams
from jaxllm.sampling_params import SamplingParams

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
_SHAPED = frozenset(("response_format", "structured_outputs", "repetition_detection"))
#: the caller's own notes, which no answer depends on
_LABELS = frozenset(("user", "metadata", "safety_identifier", "prompt_cache_key"))
#: parameter -> values that ask for nothing; others are refused. None always asks for nothing
_REFUSED: dict[str, tuple[Any, ...]] = {
    "stream": (False,),
    "stream_options": (),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "best_of": (1,),
    "use_beam_search": (False,),
    "length_penalty": (1, 1.0),
    "truncate_prompt_tokens": (),
    "mm_processor_kwargs": (),
    "kv_transfer_params": (),
    "vllm_xargs": (),
    "logits_processors": (),
}
_WHY = {
    "stream": "a batch is not streamed",
    "store": "jaxllm keeps nothing",
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


def sampling_params(
    body: Mapping[str, Any], defaults: SamplingParams, *, max_tokens: int | None, logprobs: int | None
) -> SamplingParams:
    """The body's sampling parameters; those not given are `defaults`, which come from the model.

    Args:
        max_tokens: as the endpoint understands it; None: until the context is full. As in vLLM, a `max_new_tokens` of
            the model's generation config limits it.
        logprobs: alternatives a token.

    Raises APIError for a value that cannot be used.
    """
    given: dict[str, Any] = {name: value for name, value in body.items() if name in SAMPLING and value is not None}
    try:
        given["structured_outputs"] = _structured_outputs(body)
        if body.get("repetition_detection") is not None:
            given["repetition_detection"] = RepetitionDetectionParams(**_mapping(body, "repetition_detection"))
        given["logprobs"] = logprobs
        given["max_tokens"] = _limited(max_tokens, defaults)
        return dataclasses.replace(defaults, **given)
    except (ValidationError, TypeError) as error:
        raise APIError(str(error)) from error


def _limited(max_tokens: Any, defaults: SamplingParams) -> Any:
    limit = defaults.max_tokens
    # the model's config says nothing where `defaults` has the field's own default
    if limit is None or limit == SamplingParams.max_tokens:
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
