"""The commands share options: vLLM's engine arguments and sampling parameters, in kebab-case."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from jaxllm.config.command_line import add_engine_arguments, add_option, count, engine_types, unlisted

if TYPE_CHECKING:
    from jaxllm.api.sampling_params import SamplingParams
    from jaxllm.llm import LLM

DEFAULT_MODEL = "smollm2-135m-instruct"

#: name, type (None: a switch with a --no- form), help
_SAMPLING: tuple[tuple[str, Any, str], ...] = (
    ("max_tokens", count, "most tokens to generate"),
    ("min_tokens", count, "fewest tokens to generate"),
    ("temperature", float, "randomness; 0: always the likeliest token"),
    ("top_p", float, "sample among the likeliest tokens that make up this share"),
    ("top_k", int, "sample among this many tokens"),
    ("min_p", float, "leave out tokens less likely than this share of the likeliest one"),
    ("repetition_penalty", float, "above 1: discourage tokens of prompt and output"),
    ("presence_penalty", float, "above 0: discourage tokens generated before"),
    ("frequency_penalty", float, "above 0: discourage tokens by how often they were generated"),
    ("ignore_eos", None, "do not stop at the end-of-sequence token"),
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


def add_sampling_options(parser: argparse.ArgumentParser, **defaults: Any) -> None:
    """Add the sampling parameters. `defaults` are this command's own, where they differ from `SamplingParams`."""
    group = parser.add_argument_group("sampling options")
    for name, kind, text in _SAMPLING:
        add_option(group, name, kind, text, default=defaults.get(name, argparse.SUPPRESS))
    group.add_argument(
        "--stop", action="append", default=argparse.SUPPRESS, metavar="TEXT", help="end at this text (may be repeated)"
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
    from jaxllm.llm import LLM

    model, given = engine_arguments(arguments, **defaults)
    return LLM(model, **given)


def build_sampling_params(arguments: argparse.Namespace) -> SamplingParams:
    """Return the sampling parameters that the command line describes; raise `ValidationError` for one out of range."""
    from jaxllm.api.sampling_params import SamplingParams

    names = (*(name for name, _, _ in _SAMPLING), "stop")
    return SamplingParams(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})
