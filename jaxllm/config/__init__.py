"""Configuration. What vLLM's users import from ``vllm.config`` is here under the same names."""

from typing import Any

from jaxllm.aliases import MODULES, attribute


def __getattr__(name: str) -> Any:
    if name not in MODULES["config"]:
        # Python then looks for a submodule of that name.
        raise AttributeError(f"module 'jaxllm.config' has no attribute {name!r}")
    return attribute("config", name)
