"""The parsers by vLLM's names."""

from __future__ import annotations

from jaxllm.entrypoints.openai.tools import deepseek_v3, hermes, llama3_json, mistral, pythonic, qwen3_coder
from jaxllm.entrypoints.openai.tools.calls import ToolParser

#: what a model's own calls are read with
PARSERS: dict[str, ToolParser] = {
    module.PARSER.name: module.PARSER for module in (deepseek_v3, hermes, llama3_json, mistral, pythonic, qwen3_coder)
}
