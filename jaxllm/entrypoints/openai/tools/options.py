"""Who reads a model's calls of tools and its reasoning, as the command line says."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

TOOL_CALL_PARSERS = ("deepseek_v3", "hermes", "llama3_json", "mistral", "pythonic", "qwen3_coder")


def add_tool_option(group: argparse._ActionsContainer) -> None:
    """Add ``--tool-call-parser``."""
    group.add_argument(
        "--tool-call-parser",
        choices=TOOL_CALL_PARSERS,
        metavar="NAME",
        help=f"how the model writes calls of tools: {', '.join(TOOL_CALL_PARSERS)} (default: they stay text)",
    )


def reasoning_parser(engine_arguments: Mapping[str, Any]) -> str | None:
    """Return the name of the reasoning parser that an engine is started with; None: there is none."""
    configured = engine_arguments.get("structured_outputs_config")
    nested = configured.get("reasoning_parser") if isinstance(configured, Mapping) else None
    return engine_arguments.get("reasoning_parser") or nested or None
