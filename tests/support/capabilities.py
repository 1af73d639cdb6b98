"""What jaxllm does not have yet, by capability."""

from __future__ import annotations

import dataclasses

from jaxllm.config.arguments import NOT_YET
from jaxllm.config.engine_args import EngineArgs


def arguments_to_come() -> dict[str, set[str]]:
    """Capability -> the arguments that wait for it: fields of `EngineArgs`, and vLLM's others."""
    found = {capability: set(names) for capability, names in NOT_YET.items()}
    for field in dataclasses.fields(EngineArgs):
        if field.metadata["waits_for"] is not None:
            found.setdefault(field.metadata["waits_for"], set()).add(field.name)
    return found
