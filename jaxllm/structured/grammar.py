"""`StructuredOutputsParams` become llguidance's grammars, texts that determine what may be generated."""

from __future__ import annotations

import copy
import json
from typing import Any

import llguidance
from llguidance.gbnf_to_lark import any_to_lark

from jaxllm.api.constraints import StructuredOutputsParams
from jaxllm.api.errors import ValidationError
from jaxllm.config.structured_outputs import StructuredOutputsConfig

#: keywords of JSON schema whose value maps names to schemas, and those whose value is a schema or a list of them
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")
_SCHEMAS = (
    *("additionalProperties", "unevaluatedProperties", "propertyNames", "contains", "additionalItems"),
    *("unevaluatedItems", "not", "if", "then", "else", "contentSchema", "items", "prefixItems", "allOf", "anyOf"),
    "oneOf",
)


#: characters that mean something in a regex
_META = frozenset("\\.+*?()|[]{}^$")


def serialize(
    params: StructuredOutputsParams, config: StructuredOutputsConfig, special_tokens: frozenset[str] = frozenset()
) -> str:
    """Return the grammar as llguidance takes it. It may still be wrong: only compiling it tells.

    Args:
        special_tokens: the tokenizer's; a structural tag's trigger that is one is that token, not its text.

    Raises:
        ValidationError: it cannot be written in llguidance's form.
    """
    if params.json is not None:
        return _json(params.json, params, config)
    if params.json_object:
        return _json({"type": "object"}, params, config)
    if params.regex is not None:
        return llguidance.LLMatcher.grammar_from_regex(params.regex)
    if params.choice is not None:
        # one expression: thousands of a grammar's alternatives would be more than its parser follows at once
        return llguidance.LLMatcher.grammar_from_regex("|".join(_literal(text) for text in params.choice))
    if params.grammar is not None:
        return llguidance.LLMatcher.grammar_from_lark(_lark(params.grammar))
    return _structural_tag(params, config, special_tokens)


def may_name_special_tokens(params: StructuredOutputsParams) -> bool:
    """Return whether only a compiler that has the tokenizer can judge the grammar."""
    return params.structural_tag is not None or "<" in (params.grammar or "")


def _json(schema: str | dict[str, Any], params: StructuredOutputsParams, config: StructuredOutputsConfig) -> str:
    if config.disable_additional_properties or params.disable_additional_properties:
        schema = json.loads(schema) if isinstance(schema, str) else copy.deepcopy(schema)
        _forbid_additional_properties(schema)
    options: dict[str, Any] = {
        "whitespace_flexible": not (config.disable_any_whitespace or params.disable_any_whitespace)
    }
    if params.whitespace_pattern is not None:
        options["whitespace_pattern"] = params.whitespace_pattern
    # ASCII text can hold a lone surrogate of the schema as an escape
    text = schema if isinstance(schema, str) else json.dumps(schema)
    try:
        return llguidance.LLMatcher.grammar_from_json_schema(text, defaults=options)  # pyright: ignore[reportArgumentType]
    except ValueError as error:
        raise ValidationError(f"Invalid grammar specification: {error}") from None


def _forbid_additional_properties(schema: Any) -> None:
    """Add ``additionalProperties: false`` to every schema that lists properties and says nothing of others."""
    if isinstance(schema, list):
        for item in schema:
            _forbid_additional_properties(item)
    if not isinstance(schema, dict):
        return
    for name in _MAPS:
        for item in schema[name].values() if isinstance(schema.get(name), dict) else ():
            _forbid_additional_properties(item)
    for name in _SCHEMAS:
        _forbid_additional_properties(schema.get(name))
    lists = any(isinstance(schema.get(name), dict) for name in ("properties", "patternProperties"))
    if lists and "additionalProperties" not in schema:
        schema["additionalProperties"] = False


def _literal(text: str) -> str:
    """Return a regex that matches `text` alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValidationError(f"structured_outputs.choice has a lone surrogate: {text!r:.80}") from None
    return "".join(f"\\{character}" if character in _META else character for character in text)


def _lark(grammar: str) -> str:
    try:
        return any_to_lark(grammar)
    except Exception as error:  # the converter raises what it meets
        raise ValidationError(f"Failed to convert the grammar from GBNF to Lark: {error}") from None


def _structural_tag(
    params: StructuredOutputsParams, config: StructuredOutputsConfig, special_tokens: frozenset[str]
) -> str:
    """Return text in which each trigger begins a tag whose body follows the tag's schema."""
    given = params.structural_tag
    tag = json.loads(given) if isinstance(given, str) else given
    if not isinstance(tag, dict) or "structures" not in tag or "triggers" not in tag:
        raise ValidationError(
            "structured_outputs.structural_tag must have 'structures' and 'triggers'; the form with 'format' is "
            f"xgrammar's and is not supported. Got {given!r:.80}"
        )
    try:
        tags = [_tag(structure, tag["triggers"], params, config) for structure in tag["structures"]]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValidationError(f"Invalid grammar specification: a structure lacks or misuses {error}") from None
    if not tags:
        raise ValidationError("No structural tags found in the grammar spec.")
    are_tokens = all(one.trigger in special_tokens for one in tags)
    return llguidance.LLMatcher.grammar_from_lark(llguidance.StructTag.to_grammar(tags, assume_special=are_tokens))


def _tag(
    structure: dict[str, Any], triggers: list[str], params: StructuredOutputsParams, config: StructuredOutputsConfig
) -> llguidance.StructTag:
    begin = structure["begin"]
    trigger = next((text for text in triggers if begin.startswith(text)), None)
    if not trigger:
        raise ValidationError(f"Trigger {begin} not found in triggers {triggers}")
    schema = structure["schema"]
    if config.disable_additional_properties or params.disable_additional_properties:
        schema = copy.deepcopy(schema)
        _forbid_additional_properties(schema)
    return llguidance.StructTag(trigger=trigger, begin=begin, grammar=json.dumps(schema), end=structure["end"])
