"""The commands share options: vLLM's engine arguments and sampling parameters, in kebab-case."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jaxllm.api.constraints import StructuredOutputsParams
from jaxllm.api.errors import ValidationError
from jaxllm.api.sampling_params import SamplingParams
from jaxllm.config.command_line import add_engine_arguments, add_option, engine_types, unlisted
from jaxllm.config.option_values import count, number
from jaxllm.engine.interrupt import whole_module

if TYPE_CHECKING:
    from jaxllm.llm import LLM

DEFAULT_MODEL = "smollm2-135m-instruct"

#: name, type (None: a switch with a --no- form), help
_SAMPLING: tuple[tuple[str, Any, str], ...] = (
    ("max_tokens", count, "most tokens to generate"),
    ("min_tokens", count, "fewest tokens to generate"),
    ("n", count, "completions of each prompt; for several, --temperature is above 0"),
    ("temperature", number, "randomness; 0: always the likeliest token"),
    ("top_p", number, "sample among the likeliest tokens that make up this share"),
    ("top_k", int, "sample among this many tokens; 0: all"),
    ("min_p", number, "leave out tokens less likely than this share of the likeliest one"),
    ("repetition_penalty", number, "above 1: discourage tokens of prompt and output"),
    ("presence_penalty", number, "above 0: discourage tokens generated before"),
    ("frequency_penalty", number, "above 0: discourage tokens by how often they were generated"),
    ("ignore_eos", None, "do not stop at the end-of-sequence token"),
    ("logprobs", int, "report each token's log-probability, and those of the N likeliest (default: do not)"),
)


def add_engine_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--config``, ``--model`` and the engine's arguments; those not given are left to the engine's defaults.

    vLLM's other arguments are taken as well, without being listed: the engine says what becomes of them.
    """
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="engine arguments from a YAML file, or a shipped configuration's name (latency, throughput, ...); what "
        "the command line says wins",
    )
    parser.add_argument(
        "--model",
        default=argparse.SUPPRESS,
        help=f"a named model, a local directory, a .gguf file, or a hub id (default: the configuration's, or "
        f"{DEFAULT_MODEL})",
    )
    add_engine_arguments(parser)


def add_model_argument(parser: argparse.ArgumentParser, text: str) -> None:
    """Let the model be given without ``--model``, too; the parser has that from `add_engine_options`."""
    parser.add_argument("model", nargs="?", metavar="MODEL", default=argparse.SUPPRESS, help=text)


def add_sampling_options(parser: argparse.ArgumentParser, *, without: tuple[str, ...] = (), **defaults: Any) -> None:
    """Add the sampling parameters.

    Args:
        without: parameters that this command has no use for.
        defaults: this command's own, where they differ from `SamplingParams`.
    """
    group = parser.add_argument_group("sampling options")
    for name, kind, text in _SAMPLING:
        if name not in without:
            shown = defaults.get(name, SamplingParams.__dataclass_fields__[name].default)
            add_option(group, name, kind, text, default=defaults.get(name, argparse.SUPPRESS), shown=shown)
    group.add_argument(
        "--stop",
        action="append",
        default=argparse.SUPPRESS,
        metavar="TEXT",
        help="end at this text (may be repeated; default: none)",
    )
    group.add_argument(
        "--json-schema",
        default=argparse.SUPPRESS,
        metavar="JSON|FILE",
        help="answer in JSON that has this schema, or the schema in this file (default: any text)",
    )


def engine_arguments(arguments: argparse.Namespace, **defaults: Any) -> tuple[Any, dict[str, Any]]:
    """Return the model and the engine arguments that the command line and its ``--config`` describe.

    Args:
        defaults: this command's own, for what neither of them gives.

    Raises ValidationError for a configuration that is none.
    """
    from jaxllm.config.files import load_config, with_overrides

    config = {**defaults, **(load_config(arguments.config) if arguments.config else {})}
    names = ("model", *engine_types(), *unlisted())
    given = with_overrides(config, {name: getattr(arguments, name) for name in names if hasattr(arguments, name)})
    return given.pop("model", DEFAULT_MODEL), given


def build_llm(arguments: argparse.Namespace, **defaults: Any) -> LLM:
    """Return the engine that the command line describes. `defaults` are this command's own, for what was not given."""
    model, given = engine_arguments(arguments, **defaults)
    return whole_module("jaxllm.llm").LLM(model, **given)


def build_sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """Return the sampling parameters that the command line describes; raise `ValidationError` for one out of range."""
    names = (*(name for name, _, _ in _SAMPLING), "stop")
    given: dict[str, Any] = {name: getattr(arguments, name) for name in names if hasattr(arguments, name)}
    if hasattr(arguments, "json_schema"):
        from jaxllm.structured.compiler import check_json_schema

        schema = _schema(arguments.json_schema)
        check_json_schema(schema)
        given["structured_outputs"] = StructuredOutputsParams(json=schema)
    return SamplingParams(**given)


def _schema(text: str) -> str:
    """The JSON in `text`, or in the file that it names."""
    try:
        json.loads(text)
    except ValueError as error:
        # JSON with a mistake in it is no file's name
        if text.lstrip().startswith(("{", "[", '"')):
            raise ValidationError(f"--json-schema is not JSON: {error}: {text!r:.80}") from None
    else:
        return text
    try:
        return Path(text).expanduser().read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise ValidationError(
            f'--json-schema {text!r:.80} is neither JSON, such as \'{{"type": "object"}}\', nor a file that can be '
            f"read: {error}"
        ) from None
