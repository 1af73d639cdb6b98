"""The sampling parameters of a body become `SamplingParams`."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from jaxllm.api.constraints import RepetitionDetectionParams, StructuredOutputsParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.entrypoints.openai.bodies import GenerationBody, SamplingFields
from jaxllm.entrypoints.openai.errors import APIError

#: the same in `SamplingParams`
SAMPLING = frozenset(SamplingFields.model_fields)
#: read here, by name
_SHAPED = ("response_format", "structured_outputs", "repetition_detection", "vllm_xargs")
#: different sets of parameters that are remembered
_KEPT = 64


class SamplingReader:
    """Reads the sampling parameters of bodies; those not given are `defaults`, which come from the model.

    The lines of a batch mostly ask for the same, so what was read last is kept.
    """

    def __init__(self, defaults: SamplingParams):
        self._defaults = defaults
        self._known: dict[str, SamplingParams] = {}

    def read(self, body: GenerationBody, *, max_tokens: int | None, **own: Any) -> SamplingParams:
        """Return the body's parameters, which nobody must change.

        Args:
            max_tokens: as the endpoint understands it; None: until the context is full. As in vLLM, a `max_new_tokens`
                of the model's generation config limits it.
            own: what the endpoint reads in its own way.

        Raises APIError for a value that cannot be used.
        """
        given = {name: getattr(body, name) for name in body.model_fields_set & SAMPLING}
        given = {name: given[name] for name in sorted(given) if given[name] is not None}
        given |= {"max_tokens": _limited(max_tokens, self._defaults), **own}
        shaped = {name: value for name in _SHAPED if (value := getattr(body, name)) is not None}
        key = repr((given, shaped))
        # several threads may read
        found = self._known.get(key)
        if found is None:
            found = self._build(given, shaped)
            if len(self._known) >= _KEPT:
                self._known.clear()
            self._known[key] = found
        return found

    def _build(self, given: dict[str, Any], shaped: dict[str, Any]) -> SamplingParams:
        try:
            # a tool that has to be called has made them already
            given.setdefault("structured_outputs", _structured_outputs(shaped))
            if "repetition_detection" in shaped:
                given["repetition_detection"] = RepetitionDetectionParams(**shaped["repetition_detection"])
            if "vllm_xargs" in shaped:
                given["extra_args"] = shaped["vllm_xargs"]
            return dataclasses.replace(self._defaults, **given)
        except (ValidationError, TypeError) as error:
            raise APIError(str(error)) from error


def _limited(max_tokens: int | None, defaults: SamplingParams) -> int | None:
    limit = defaults.max_tokens
    # the model's config says nothing where `defaults` has the field's own default
    if limit is None or limit == SamplingParams().max_tokens:
        return max_tokens
    return limit if max_tokens is None else min(max_tokens, limit)


def _structured_outputs(body: Mapping[str, dict[str, Any]]) -> StructuredOutputsParams | None:
    asked: list[dict[str, Any]] = []
    if "structured_outputs" in body:
        asked.append(body["structured_outputs"])
    if "response_format" in body:
        form = body["response_format"]
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
