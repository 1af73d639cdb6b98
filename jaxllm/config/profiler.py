"""Where profiles go: vLLM's `ProfilerConfig`, as far as it has a meaning here."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxllm.api.errors import ValidationError
from jaxllm.config import argument_checks as check
from jaxllm.config.argument import Arguments, argument


def _zero(name: str, value: Any) -> int:
    if value:
        raise ValidationError(
            "profiler_config takes 'torch_profiler_dir' (where traces go) and 'profiler' ('jax', or 'torch', which "
            f"means the same here), while start_profile and stop_profile say when; got {name}={value!r}."
        )
    return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ProfilerConfig(Arguments):
    """What `LLM.start_profile` does."""

    NAME = "profiler_config['{}']"

    profiler: str | None = argument(None, check.one_of("torch", "jax"), "either name means JAX's")
    torch_profiler_dir: str | None = argument(None, check.path_text, "where traces go")
    delay_iterations: int = argument(0, _zero, None)
    max_iterations: int = argument(0, _zero, None)
